"""A command line from start to exit code; errors are printed as one line."""

import errno
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentError
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from experiment.commands.cli import ExperimentCLI
from experiment.commands.signals import ended_by_signals
from experiment.console import console
from experiment.errors import InputError
from experiment.invocation import command
from experiment.quiet import quiet_libraries
from experiment.runs.run import CONFIG
from experiment.runs.stopping import Interrupted
from experiment.startup import leave_slurm_alone

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(cli: type[ExperimentCLI], args: Sequence[str] | None = None) -> ExperimentCLI:
    """Run an experiment's command line.

    Bad input ends with one line on stderr and exit code 2 (``--debug`` adds the traceback), and so does a disk
    that is full or not writable. Ctrl-C ends with exit code 130 and SIGTERM with 143, as in shells. Every
    other exception is a bug and propagates.

    Args:
        cli: The experiment's own subclass of ExperimentCLI, which takes ``args`` alone.
        args: Command line arguments, by default the process's own.
    """
    given = sys.argv[1:] if args is None else list(args)
    debug, resume = "--debug" in given, os.environ.get("TINYLAB_RESUME")  # how a caller, such as make, resumes
    quiet_libraries(debug)
    leave_slurm_alone()
    console.quiet = rank_zero_only.rank != 0  # only one process prints
    try:
        with ended_by_signals():
            return cli(args)
    except (InputError, ArgumentError, MisconfigurationException) as error:  # the last is Lightning's own
        if debug:
            raise
        from experiment.commands.mistakes import run_of_another_package
        from experiment.wording import reworded

        _end(run_of_another_package(cli.package, given) or reworded(str(error)))
    except OSError as error:
        if debug or error.errno not in UNWRITABLE:
            raise
        cure = "free space or choose another folder with --run_dir"
        _end(f"{error.filename or 'a file'} cannot be written ({error.strerror}): {cure}")
    except RuntimeError as error:
        from experiment.runs.launch import waited_in_vain

        if debug or (line := waited_in_vain(error)) is None:
            raise
        _end(line, 1)
    except Interrupted as interruption:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        again = shlex.join(given).replace(" --ckpt_path=last", "").replace(" --ckpt_path last", "")
        if "--run_dir" not in again and CONFIG in again:  # which would mean the run that it is of
            again = f"{again} --run_dir {shlex.quote(interruption.run_dir)}"
        console.print(f"stopped; resume with\n  {resume or f'{command(cli.package)} {again} --ckpt_path last'}")
        sys.exit(interruption.exit_code)
    except (KeyboardInterrupt, SystemExit) as ending:  # Lightning turns the first into the second
        terminated = isinstance(ending, SIGTERMException)
        if isinstance(ending, SystemExit) and not isinstance(ending.__context__, KeyboardInterrupt) and not terminated:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        console.print(f"\ninterrupted; resume with\n  {resume}" if resume else "\ninterrupted")
        sys.exit(143 if terminated else 130)


def _end(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
