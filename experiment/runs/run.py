"""The run folder: where it is, and which process may write to it.

runs/lm/demo/            config.yaml  metrics.csv  samples.jsonl  predictions.jsonl
runs/lm/demo/checkpoints last.ckpt  best.ckpt  step-000500.ckpt …
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from experiment.errors import InputError
from experiment.sources.paths import user_path
from experiment.startup import is_alone

CONFIG = "config.yaml"
LOCK_PATIENCE = 6.0  # seconds
RUN_DIR_VARIABLE = "TINYLAB_RUN_DIR"  # passes the folder to the processes that Lightning starts


def is_run(folder: Path) -> bool:
    """Whether fit has written to this folder; a config.yaml alone is not enough."""
    return any((folder / name).exists() for name in ("checkpoints", "metrics.csv"))


def holds_run(folder: Path) -> bool:
    """Whether a new run would overwrite something in this folder."""
    return is_run(folder) or (folder / CONFIG).exists()


def run_name(configs: list[Path]) -> str:
    """The name of a run: its first config's, or that of a config.yaml's folder."""
    first = configs[0].absolute() if configs else Path()
    return (first.parent.name if first.name == CONFIG else first.stem) or "default"


def default_run_dirs(package: str, configs: list[Path]) -> tuple[Path | None, Path]:
    """The newest existing folder of this configuration's runs, and the next free one."""
    if configs and configs[0].name == CONFIG and is_run(configs[0].parent):
        base = configs[0].parent if configs[0].parent.name else configs[0].absolute().parent
        newest = base
    else:
        base, newest = Path("runs") / package / run_name(configs), None
    number, folder = 1, base
    while holds_run(folder):
        newest = newest if newest is base and configs[0].name == CONFIG else folder
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return newest, folder


def agreed(what: str, decide: Callable[[], str]) -> str:
    """The first process's result of ``decide``, in all processes: see experiment/runs/launch.py."""
    if is_alone():
        return decide()
    from experiment.runs import launch

    return launch.agreed(what, decide)


def resolve_run_dir(
    package: str, subcommand: str, run_dir: str | None, configs: list[Path], ckpt_path: str | None
) -> Path:
    """The folder that this command reads and writes.

    A new training takes ``run_dir``, or by default ``runs/<package>/<config's name>``, ``-2``, ``-3`` … where
    taken. The other commands, and resumed trainings, use the folder of their checkpoint.

    Raises:
        InputError: A new training would write to the folder of another run.
    """

    def decide() -> str:
        if os.environ.get("LOCAL_RANK", "0") != "0" and RUN_DIR_VARIABLE in os.environ:
            return os.environ[RUN_DIR_VARIABLE]
        return str(_choose_run_dir(package, subcommand, run_dir, configs, ckpt_path))

    folder = Path(agreed("run_dir", decide))
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    return folder


def _choose_run_dir(
    package: str, subcommand: str, run_dir: str | None, configs: list[Path], ckpt_path: str | None
) -> Path:
    own = ckpt_path in ("last", "best")
    of_file = None if own or ckpt_path is None else run_of(ckpt_path)
    if run_dir is not None:
        folder = user_path(run_dir)
        if subcommand == "fit":
            check_free(folder, resumed=own or (of_file is not None and of_file.resolve() == folder.resolve()))
        return folder
    newest, free = default_run_dirs(package, configs)
    if subcommand == "fit":
        return newest if own and newest else free
    return of_file if of_file is not None and holds_run(of_file) else newest or free


def recorded(run: Path, key: str) -> Any:
    """The value of ``key``, such as data.path, in a run's config.yaml; None if the file or the key is missing."""
    try:
        value = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        for name in key.split("."):
            value = value[name]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return value


def check_free(folder: Path, resumed: bool) -> None:
    """Check that a training would not overwrite anything.

    Raises:
        InputError: The folder holds a run that is not being resumed, or a config.yaml not written by fit.
    """
    if is_run(folder) and not resumed:
        raise InputError(
            f"run_dir {folder} already holds a run: resume it with --ckpt_path last, delete the folder, or name another"
        )
    if holds_run(folder) and not is_run(folder):
        raise InputError(
            f"run_dir {folder} holds a {CONFIG} not written by fit, which would be overwritten: name another folder"
        )


@contextmanager
def hold_run_dir(folder: Path, resumed: bool) -> Iterator[None]:
    """Create and lock a run's folder, so that no other training writes to it.

    Raises:
        InputError: Another training has locked it, it is not writable, or it is not free.
    """
    # The workers of a killed training hold its lock for a few more seconds.
    lock = FileLock(folder / ".lock", timeout=LOCK_PATIENCE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"run_dir {folder} is in use by another training: wait until it ends, or name another folder"
        ) from error
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        cure = "choose another with --run_dir"
        raise InputError(f"run_dir {folder} cannot be written ({error.strerror}): {cure}") from error
    try:
        check_free(folder, resumed)  # another process may have been faster
        yield
    finally:
        lock.release()


def run_of(ckpt_path: str | Path) -> Path:
    """The folder of a checkpoint's run."""
    folder = user_path(ckpt_path).parent
    return folder.parent if folder.name == "checkpoints" else folder
