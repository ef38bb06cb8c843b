"""The folder of a run: where it is, and its checkpoints, read without running code.

runs/lm/demo/            config.yaml  metrics.csv  samples.jsonl  predictions.jsonl
runs/lm/demo/checkpoints last.ckpt  best.ckpt  step-000500.ckpt …
"""

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch import LightningModule

from experiment.console import console
from experiment.errors import InputError
from experiment.runs.launch import agreed, is_child
from experiment.sources.paths import user_path

CONFIG = "config.yaml"
LOCK_PATIENCE = 6.0  # seconds
_verified: set[tuple[Path, int]] = set()  # checkpoints, as they were written at that time
RUN_DIR_VARIABLE = "TINYLAB_RUN_DIR"  # tells the folder to the processes that Lightning starts beside the first


def is_run(folder: Path) -> bool:
    """Whether fit has written into this folder; a config.yaml alone may be anybody's."""
    return any((folder / name).exists() for name in ("checkpoints", "metrics.csv"))


def holds_run(folder: Path) -> bool:
    """Whether a new run would write over something in this folder."""
    return is_run(folder) or (folder / CONFIG).exists()


def run_name(configs: list[Path]) -> str:
    """The name of a run: its first config's, or of the folder that holds a config.yaml."""
    first = configs[0].absolute() if configs else Path()
    return (first.parent.name if first.name == CONFIG else first.stem) or "default"


def default_run_dirs(package: str, configs: list[Path]) -> tuple[Path | None, Path]:
    """The newest existing folder of this configuration's runs, and the first that is free."""
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


def resolve_run_dir(
    package: str, subcommand: str, run_dir: str | None, configs: list[Path], ckpt_path: str | None
) -> Path:
    """The folder that this command reads and writes.

    A new training takes ``run_dir``, or by default ``runs/<package>/<config's name>``, ``-2``, ``-3`` … where
    taken. The other commands, and a training that is resumed, use the folder of their checkpoint.

    Raises:
        InputError: A new training would write into the folder of another.
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
    own_checkpoint = ckpt_path in ("last", "best")
    if run_dir is not None:
        folder = user_path(run_dir)
        inside = ckpt_path is not None and (own_checkpoint or run_of(ckpt_path).resolve() == folder.resolve())
        if subcommand == "fit":
            check_free(folder, resumed=inside)
    else:
        newest, free = default_run_dirs(package, configs)
        if subcommand == "fit":
            folder = newest if own_checkpoint and newest else free
        elif ckpt_path is not None and not own_checkpoint and holds_run(run_of(ckpt_path)):
            folder = run_of(ckpt_path)
        else:
            folder = newest or free
    return folder


def recorded(run: Path, key: str) -> Any:
    """What the config.yaml of a run says of ``key``, such as data.path; None where there is none or it says nothing."""
    try:
        value = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        for name in key.split("."):
            value = value[name]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return value


def check_free(folder: Path, resumed: bool) -> None:
    """Check that a training would write over nothing.

    Raises:
        InputError: The folder holds a run that is not resumed, or a config.yaml that fit has not written.
    """
    if is_run(folder) and not resumed:
        raise InputError(
            f"run_dir {folder} already holds a run: continue it with --ckpt_path last, or name another folder"
        )
    if holds_run(folder) and not is_run(folder):
        raise InputError(
            f"run_dir {folder} holds a {CONFIG} that fit has not written, and would write over: name another folder"
        )


@contextmanager
def hold_run_dir(folder: Path, resumed: bool) -> Iterator[None]:
    """Make a run's folder and hold it, so that no other training writes into it.

    Raises:
        InputError: Another training holds it, it cannot be written, or it is not free.
    """
    # The workers of a training that was killed hold its lock for some seconds more.
    lock = FileLock(folder / ".lock", timeout=LOCK_PATIENCE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"run_dir {folder} is being written by another training: wait for its end, or name another folder"
        ) from error
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        cure = "choose another with --run_dir"
        raise InputError(f"run_dir {folder} cannot be written ({error.strerror}): {cure}") from error
    try:
        check_free(folder, resumed)  # another may have been quicker
        yield
    finally:
        lock.release()


def run_of(ckpt_path: str | Path) -> Path:
    """The folder of a checkpoint's run."""
    folder = user_path(ckpt_path).parent
    return folder.parent if folder.name == "checkpoints" else folder


def resolve_checkpoint(subcommand: str, run_dir: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint file that ``--ckpt_path`` means; ``last`` and ``best`` are those of the run's own folder.

    A copy of a run may lack the link last.ckpt: the newest whole checkpoint stands in for it. A training that is
    resumed from ``last`` before anything was saved starts at the beginning, so that the same command works whenever a
    machine was taken away.

    Raises:
        InputError: There is no such file, or none that is whole.
    """
    if ckpt_path is None:
        return None
    named = ckpt_path in ("last", "best")
    file = run_dir / "checkpoints" / f"{ckpt_path}.ckpt" if named else user_path(ckpt_path)
    if is_checkpoint(file):
        return file
    there = sorted(path.name for path in file.parent.glob("*.ckpt"))
    if ckpt_path == "last" and (newest := newest_checkpoint(file.parent)):
        console.print(f"note: {file} is not there; {newest.name} is the newest whole checkpoint")
        return newest
    if subcommand == "fit" and ckpt_path == "last" and not there:
        return None
    raise InputError(
        f"ckpt_path {ckpt_path}: there is no file {file}; expected last, best or a path"
        + (f" (that folder holds {', '.join(there)})" if there else "")
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step among those of fit in a folder that can be read."""
    steps = {}
    # Names have the steps in order, so that only one of them is read, and the best, which may be newer.
    for pattern in ("step-*.ckpt", "best.ckpt"):
        for file in sorted(folder.glob(pattern), reverse=True):
            with suppress(InputError):
                steps[file] = read_checkpoint(file, part="outline").get("global_step", 0)
                break
    return max(steps, key=steps.__getitem__, default=None)


def _sharding() -> ModuleType:
    """What reads the folders that several processes write: other checkpoints do not need it."""
    from experiment.runs import sharding

    return sharding


def is_checkpoint(path: Path) -> bool:
    """Whether there is a file, or the folder that several processes write together."""
    return path.is_file() or (path.is_dir() and _sharding().is_sharded(path))


def verify(file: Path) -> None:
    """Check that a checkpoint holds what was written. A process reads it whole for that once; one that Lightning has
    started leaves it to the first.

    Raises:
        ValueError: It is damaged; and what the reader of zip files raises.
    """
    key = _as_written(file)
    if key in _verified or is_child():
        return
    if file.is_dir():
        _sharding().verify(file)
    else:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums it writes
                raise ValueError(f"{damaged} is damaged")
    _verified.add(key)


def verify_together(file: Path) -> None:
    """`verify` in the first of the processes of a launch, for all of them.

    Raises:
        InputError: As `read_checkpoint`.
    """

    def look() -> str:
        read_checkpoint(file, part="outline")
        return "whole"

    agreed("checkpoint", look)
    _verified.add(_as_written(file))


def _as_written(file: Path) -> tuple[Path, int]:
    parts = [file, *file.iterdir()] if file.is_dir() else [file]
    return file.resolve(), max(part.stat().st_mtime_ns for part in parts)


def read_checkpoint(file: Path, part: Literal["all", "weights", "outline"] = "weights") -> dict[str, Any]:
    """A Lightning checkpoint, mapped into memory; nothing but tensors and plain values is ever unpickled.

    Args:
        file: The file, or the folder that several processes have written.
        part: How much of a folder is read: ``weights`` leaves the optimizers' states empty, ``outline`` gives the
            shapes of the weights alone, as tensors on the meta device. Of a file it is always all.

    Raises:
        InputError: The file is missing or truncated, is no checkpoint, or would have to run code to be loaded.
    """
    if not is_checkpoint(file):
        raise InputError(f"there is no checkpoint {file}: expected a file that fit has written")
    try:
        verify(file)
        if file.is_dir():
            checkpoint = _sharding().read(file, part)
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(checkpoint, dict):
                from experiment.renamed import current_checkpoint

                current_checkpoint(checkpoint)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"ckpt_path {file} is refused: it is no checkpoint, or holds objects that would run code when loaded; "
            "expected a file that fit has written"
        ) from error
    except Exception as error:  # what a damaged file makes the readers of zip and pickle raise has no bounds
        others = sorted(other.name for other in file.parent.glob("*.ckpt") if other.resolve() != file.resolve())
        raise InputError(
            f"ckpt_path {file} cannot be read: it is truncated or no checkpoint; take another one"
            + (f" ({', '.join(others)})" if others else " of that run")
        ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise InputError(
            f"ckpt_path {file} is no Lightning checkpoint (no state_dict): expected a file that fit has written"
        )
    if not isinstance(checkpoint.get("global_step", 0), int):
        raise InputError(f"ckpt_path {file} is no Lightning checkpoint: its global_step is no number of steps")
    return checkpoint


def check_fits(module: LightningModule, file: Path) -> None:
    """Check that a checkpoint is one of this model before anything is changed.

    Raises:
        InputError: A weight is missing, left over, or of another shape.
    """
    stored = read_checkpoint(file, part="outline")["state_dict"]
    expected = module.state_dict()
    cure = "use the configuration and the tokenizer it was trained with (config.yaml in its run's folder)"
    for name, weight in expected.items():
        if name not in stored:
            raise InputError(f"ckpt_path {file} is of another architecture: it has no {name}; {cure}")
        if stored[name].shape != weight.shape:
            raise InputError(
                f"ckpt_path {file} is of another architecture: {name} is {tuple(stored[name].shape)}, "
                f"expected {tuple(weight.shape)}; {cure}"
            )
    if left := [name for name in stored if name not in expected]:
        raise InputError(f"ckpt_path {file} is of another architecture: this model has no {left[0]}; {cure}")
