"""Use runs from Python: load one, generate a story, classify a review, evaluate.

>>> import tinylab
>>> teller = tinylab.load("runs/demo/lm")                      # doctest: +SKIP
>>> teller.tell("Once upon a time", temperature=0.8)           # doctest: +SKIP
>>> tinylab.load("runs/demo/custom").classify("The plot was anything but dull.")  # doctest: +SKIP
>>> tinylab.evaluate("runs/demo/lm")["val/perplexity"]         # doctest: +SKIP

The command line is `tinylab` (see `tinylab.__main__`). It may import every package; none imports it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from classify.demo import ClassifierDemo
    from lm.demo import LanguageModelDemo

__all__ = ["evaluate", "load"]


def load(run: str | Path) -> "LanguageModelDemo | ClassifierDemo":
    """The model of a run, from its best checkpoint, or else its last.

    Args:
        run: Folder that `fit` has written, or a checkpoint in it.

    Raises:
        InputError: There is no such run, or it cannot be read.
    """
    from experiment.runs.reading import find_checkpoint, package_of
    from experiment.sources.paths import user_path

    checkpoint = find_checkpoint(user_path(run))
    if package_of(checkpoint) == "lm":
        from lm.demo import LanguageModelDemo

        return LanguageModelDemo(checkpoint)
    from classify.demo import ClassifierDemo

    return ClassifierDemo(checkpoint)


def evaluate(run: str | Path, *flags: str) -> dict[str, float]:
    """The metrics of a run's best checkpoint on its validation split, such as ``val/loss`` and ``val/perplexity``.

    Args:
        run: Folder that `fit` has written, or a checkpoint in it.
        flags: As on the command line, such as ``"--data.path", "FOLDER"``.

    Raises:
        InputError: There is no such run, or a flag cannot be used.
    """
    from importlib import import_module

    from jsonargparse import ArgumentError

    from experiment.errors import InputError
    from experiment.quiet import quiet_libraries
    from experiment.runs.reading import find_checkpoint, package_of
    from experiment.runs.run import CONFIG, run_of
    from experiment.sources.paths import user_path
    from experiment.wording import reworded

    checkpoint = find_checkpoint(user_path(run))
    quiet_libraries()
    config = str(run_of(checkpoint) / CONFIG)
    arguments = ["validate", "--config", config, "--ckpt_path", str(checkpoint), "--verbose=false", *flags]
    try:
        cli = import_module(f"{package_of(checkpoint)}.cli").CLI(arguments)
    except (InputError, ArgumentError) as error:
        raise InputError(reworded(str(error))) from None
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
