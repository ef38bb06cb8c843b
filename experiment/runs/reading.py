"""Checkpoints: finding them, checking that they fit, and reading them without running code."""

import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from experiment.console import console
from experiment.errors import InputError
from experiment.invocation import command
from experiment.renamed import current_checkpoint
from experiment.runs.launch import agreed, is_child
from experiment.runs.provenance import missing_run
from experiment.runs.run import CONFIG, is_run, run_of
from experiment.sources.configurations import read_configuration
from experiment.sources.paths import user_path
from experiment.wording import hint

PACKAGES = {"decoder": "lm", "adapter": "classify"}  # by a hyperparameter unique to the package's checkpoints
_verified: set[tuple[Path, int]] = set()  # checkpoints, by file and time of writing


def resolve_checkpoint(subcommand: str, run_dir: Path, ckpt_path: str) -> Path | None:
    """The checkpoint file that ``--ckpt_path`` means; ``last`` and ``best`` are those of the run's own folder.

    A copy of a run may lack the link last.ckpt: the newest whole checkpoint is used instead. A training that is
    resumed from ``last`` before anything was saved starts from scratch, so that the same command works whenever a
    machine was lost.

    Raises:
        InputError: There is no such file, or no complete one.
    """
    named = ckpt_path in ("last", "best")
    file = run_dir / "checkpoints" / f"{ckpt_path}.ckpt" if named else user_path(ckpt_path)
    if is_checkpoint(file):
        return file
    there = sorted(path.name for path in file.parent.glob("*.ckpt"))
    if ckpt_path == "last" and (newest := newest_checkpoint(file.parent)):
        console.print(f"note: {file} does not exist; using {newest.name}, the newest whole checkpoint")
        return newest
    if subcommand == "fit" and ckpt_path == "last" and not there:
        console.print(f"note: {run_dir} has no checkpoint yet, so training starts at step 0")
        return None
    if named and not is_run(run_dir):
        raise missing_run(run_dir, "checkpoint")
    if not named and is_run(file):
        best = find_checkpoint(file)
        raise InputError(
            f"ckpt_path {ckpt_path} is the folder of a run: give --ckpt_path {best}, or --config {file / CONFIG} "
            f"--ckpt_path {'best' if best.stem == 'best' else 'last'}"
        )
    raise InputError(
        f"ckpt_path {ckpt_path}: there is no file {file}{hint(file.name, ['last', 'best', *there])}; expected last, "
        "best or a path" + (f" (that folder holds {', '.join(there)})" if there else "")
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The readable checkpoint with the highest step among fit's own in a folder."""
    steps = {}
    # Names sort by step, so only one of them is read, and the best, which may be newer.
    for pattern in ("step-*.ckpt", "best.ckpt"):
        for file in sorted(folder.glob(pattern), reverse=True):
            with suppress(InputError):
                steps[file] = read_checkpoint(file, part="outline").get("global_step", 0)
                break
    return max(steps, key=steps.__getitem__, default=None)


def find_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run's folder, or else the last; a file is returned unchanged.

    Raises:
        InputError: There is none.
    """
    folder = run / "checkpoints"
    for file in (run, folder / "best.ckpt", folder / "last.ckpt"):
        if is_checkpoint(file):
            return file
    if newest := newest_checkpoint(folder):
        return newest
    raise missing_run(run, "checkpoint")


def is_checkpoint(path: Path) -> bool:
    """Whether the path is a file, or a folder written by several processes."""
    if path.is_dir():
        from experiment.runs.sharding import is_sharded

        return is_sharded(path)
    return path.is_file()


def verify(file: Path) -> None:
    """Check that a checkpoint is undamaged. Each process reads it completely once; one started by Lightning
    leaves it to the first.

    Raises:
        ValueError: It is damaged; also whatever zipfile raises.
    """
    key = _as_written(file)
    if key in _verified or is_child():
        return
    if file.is_dir():
        from experiment.runs import sharding

        sharding.verify(file)
    else:
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums it writes
                raise ValueError(f"{damaged} is damaged")
    _verified.add(key)


def verify_together(file: Path) -> None:
    """Run `verify` in the first process of a launch, for all processes.

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
    """A Lightning checkpoint, memory-mapped; only tensors and plain values are ever unpickled.

    Args:
        file: The file, or the folder written by several processes.
        part: How much of a folder to read: ``weights`` leaves optimizer states empty, ``outline`` gives only the
            shapes of the weights, as tensors on the meta device. A file is always read completely.

    Raises:
        InputError: The file is missing or truncated, is not a checkpoint, or would run code when loaded.
    """
    if not is_checkpoint(file):
        raise InputError(f"there is no checkpoint {file}: expected a file written by fit")
    try:
        verify(file)
        if file.is_dir():
            from experiment.runs import sharding

            checkpoint = sharding.read(file, part)
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(checkpoint, dict):
                current_checkpoint(checkpoint)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"ckpt_path {file} is refused: it is not a checkpoint, or holds objects that would run code when loaded; "
            "expected a file written by fit"
        ) from error
    except Exception as error:  # zip and pickle readers can raise anything on a damaged file
        others = sorted(other.name for other in file.parent.glob("*.ckpt") if other.resolve() != file.resolve())
        raise InputError(
            f"ckpt_path {file} cannot be read: it is truncated or not a checkpoint; use another one"
            + (f" ({', '.join(others)})" if others else " of that run")
        ) from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise InputError(
            f"ckpt_path {file} is not a Lightning checkpoint (no state_dict): expected a file written by fit"
        )
    if not isinstance(checkpoint.get("global_step", 0), int):
        raise InputError(f"ckpt_path {file} is not a Lightning checkpoint: its global_step is not a number of steps")
    return checkpoint


def package_of(file: Path) -> str:
    """The package that wrote a checkpoint: lm or classify.

    Raises:
        InputError: The file cannot be read, or belongs to neither.
    """
    hyperparameters = read_checkpoint(file, part="outline").get("hyper_parameters", {})
    package = next((package for key, package in PACKAGES.items() if key in hyperparameters), None)
    if package is None:
        raise InputError(f"{file} is not a checkpoint of lm or classify: expected one written by fit")
    return package


def note_other_data(run: Path, path: Any) -> None:
    """Say so if a run is resumed on other data than it was trained on."""
    before = read_configuration(run / CONFIG).get("data", {}).get("path") if (run / CONFIG).is_file() else None
    if before not in (None, path):
        console.print(
            f"note: {run} was trained on data.path {before}, and now goes on with {path}; for a new training on "
            f"that, give --model.init_from {run} and another --run_dir"
        )


def of_another_package(run: Path, package: str) -> str | None:
    """The message if a run's folder, or a checkpoint, is not of this package, up to the command to use instead; else
    None."""
    with suppress(InputError):
        checkpoint = find_checkpoint(run)
        if (other := package_of(checkpoint)) != package:
            return f"{run_of(checkpoint)} is a run of {other}: use {command(other)}"
    return None


def check_fits(module: LightningModule, file: Path) -> None:
    """Check that a checkpoint fits this model before anything is changed.

    Raises:
        InputError: A weight is missing, unexpected, or of another shape.
    """
    weights = read_checkpoint(file, part="outline")["state_dict"], module.state_dict()
    stored, expected = ({name: tuple(weight.shape) for name, weight in one.items()} for one in weights)
    for name in {**expected, **stored}:
        if (found := stored.get(name, "missing")) != (wanted := expected.get(name, "no such weight")):
            raise InputError(
                f"ckpt_path {file} has another architecture: {name} is {found}, expected {wanted}; use the "
                "configuration and the tokenizer it was trained with (config.yaml in its run's folder)"
            )


def check_resume(trainer: Trainer, module: LightningModule, stored: Mapping[str, Any], file: Path) -> str | None:
    """The option that leaves nothing to train from this checkpoint; None if there is something left.

    Raises:
        InputError: The checkpoint is from another optimizer.
    """
    try:
        epochs = stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    except (KeyError, TypeError):  # an imported model
        return None
    groups = [len(group["params"]) for group in module.parameter_groups()]
    states = stored.get("optimizer_states", [])
    before = [len(group["params"]) for state in states for group in state.get("param_groups", [])]
    if before not in ([], groups):
        raise InputError(
            f"{file} is from another optimizer: its groups hold {before} weights, expected {groups}; give the "
            "options, and the version of tinylab, that it was trained with, or start a new run"
        )
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= stored["global_step"]:
        return f"trainer.max_steps {trainer.max_steps}"
    if loop.max_epochs is not None and 0 <= loop.max_epochs <= epochs:
        limit = f"trainer.max_epochs {loop.max_epochs}"
        loop.max_epochs = epochs  # Lightning refuses a smaller one
        return limit
    return None
