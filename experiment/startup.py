"""What a command does before importing torch: answer --help, set up memory, and watch its launcher."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec

COMMANDS = ("fit", "validate", "test", "predict")
LAUNCHER = "TINYLAB_LAUNCHER"  # the first process, for those that Lightning starts
# Set by torchrun, SLURM, LSF, MPI, Kubeflow or other launchers to number processes.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK",
             "MV2_COMM_WORLD_SIZE", "RANK", "NODE_RANK")  # fmt: skip
PULSE = 0.5  # seconds between two checks

VARIABLES = {
    # Put tensors of 2 MiB and more into huge pages if the system provides them on request.
    "THP_MEM_ALLOC_ENABLE": "1",
    # GPU memory segments grow in place, so that batches of other widths fit.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
# glibc's: the variable that a user would set, its mallopt number, and our value.
GLIBC = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1)}
_GIVE_BACK = {"MALLOC_MMAP_MAX_": (-4, 65536), "MALLOC_MMAP_THRESHOLD_": (-3, 2**20)}
_FOREIGN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # if any of these is set, the user has configured an allocator


def start(overview: str, args: Sequence[str]) -> None:
    """Start a command line, before its slow imports."""
    answer(overview, args)
    end_at_interrupt()
    set_up_allocators()
    end_with_launcher()


def answer(overview: str, args: Sequence[str], commands: Iterable[str] = COMMANDS, options_first: bool = True) -> None:
    """Exit if the arguments ask for the overview (exit code 0), name no known command (2), or if the
    system is not supported (2). With `options_first`, options may precede the command."""
    if sys.platform == "win32":  # lacks the signals, locks and links used here
        print("error: Windows is not supported: expected Linux or macOS; use WSL (wsl --install)", file=sys.stderr)
        sys.exit(2)
    if args and args[0] in ("-h", "--help"):
        from experiment.wording import as_called

        print(as_called(overview.strip()))
        sys.exit(0)
    if not args or (args[0] not in commands and not (options_first and args[0].startswith("-"))):
        from experiment.wording import hint_command

        found = f"{args[0]!r} is not a command{hint_command(args[0], commands)}" if args else "no command is given"
        print(f"error: {found}: expected {', '.join(commands)}; --help explains them", file=sys.stderr)
        sys.exit(2)
    if find_spec("lightning") is None:
        print("error: this Python has no lightning: make setup, then source .venv/bin/activate", file=sys.stderr)
        sys.exit(2)


def end_at_interrupt() -> None:
    """Let Ctrl-C end the process without a traceback, until `imports_are_done`."""
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def imports_are_done() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(*_: object) -> None:
    resume = os.environ.get("TINYLAB_RESUME")  # how a caller, such as make, resumes
    os.write(1, f"\ninterrupted; resume with\n  {resume}\n".encode() if resume else b"\ninterrupted\n")
    os._exit(130)


def set_up_allocators() -> None:
    """Set what the user has not set, for this process and its children; on Linux only.

    Freed memory is kept for the next batch: otherwise it would be faulted in again, 5 % of training time and a
    fifth of evaluation time. Batches have few widths, so it does not grow (see `rounded_width` in
    experiment/sources/batches.py).
    """
    if sys.platform != "linux":
        return
    for name, value in VARIABLES.items():
        if name != "PYTORCH_ALLOC_CONF" or "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault(name, value)
    _set_glibc(GLIBC)


def give_back_large_blocks() -> None:
    """From now on, return blocks of a MiB and more to the system as soon as they are freed.

    For weights gathered one layer at a time: kept blocks would leave holes between longer-lived ones, which came
    to more than half of what was in use.
    """
    if sys.platform == "linux":
        _set_glibc(_GIVE_BACK)


def _set_glibc(options: dict[str, tuple[int, int]]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith(_FOREIGN) for name in os.environ):
        for number, value in options.values():
            mallopt(number, value)


def leave_slurm_alone() -> None:
    """Within a SLURM job, run as a single process unless srun started it.

    Lightning treats every process of a job as one of several tasks, and fails if srun's variables are missing.
    """
    if "SLURM_NTASKS" in os.environ and "SLURM_STEP_ID" not in os.environ:
        os.environ["SLURM_JOB_NAME"] = "interactive"  # how Lightning recognizes such a process


def is_alone() -> bool:
    """Whether no launcher started this process with others; processes that Lightning starts count as alone."""
    return not any(name in os.environ for name in LAUNCHERS)


def end_with_launcher() -> None:
    """If this is one of several processes, end it as soon as its launcher is gone."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
        return
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    launcher = os.getppid() if by_torchrun else int(os.environ.get(LAUNCHER, os.getppid()))
    threading.Thread(target=_wait_for_end, args=(launcher,), daemon=True).start()


def _wait_for_end(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(PULSE)
    os._exit(143)  # as after a SIGTERM; files are written under a temporary name and renamed
