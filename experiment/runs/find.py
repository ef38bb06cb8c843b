"""A run that is to be used: its best checkpoint, and what it is of."""

from pathlib import Path

from experiment.errors import InputError
from experiment.runs.run import is_checkpoint, newest_checkpoint, read_checkpoint

PACKAGES = {"decoder": "lm", "adapter": "classify"}  # by a hyperparameter that only this package's checkpoints have


def find_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run's folder, or the last; a file is itself.

    Raises:
        InputError: There is none.
    """
    if is_checkpoint(run):
        return run
    if not run.exists():
        raise InputError(f"run {run} does not exist: expected the folder of a run that fit has written, or a file")
    for name in ("best.ckpt", "last.ckpt"):
        if is_checkpoint(run / "checkpoints" / name):
            return run / "checkpoints" / name
    if newest := newest_checkpoint(run / "checkpoints"):
        return newest
    raise InputError(f"run {run} holds no checkpoint: expected the folder of a run that fit has written, or a file")


def package_of(file: Path) -> str:
    """The package whose `fit` has written a checkpoint: lm or classify.

    Raises:
        InputError: The file cannot be read, or is of neither.
    """
    hyperparameters = read_checkpoint(file, part="outline").get("hyper_parameters", {})
    package = next((package for key, package in PACKAGES.items() if key in hyperparameters), None)
    if package is None:
        raise InputError(f"{file} is not a checkpoint of lm or classify: expected one that fit has written")
    return package
