"""Use runs from Python: load one, tell a story, classify a review, evaluate.

>>> import tinylab
>>> teller = tinylab.load("runs/demo/lm")                      # doctest: +SKIP
>>> teller.tell("Once upon a time", temperature=0.8)           # doctest: +SKIP
>>> tinylab.load("runs/demo/custom").classify("The plot was anything but dull.")  # doctest: +SKIP
>>> tinylab.evaluate("runs/demo/lm")["val/perplexity"]         # doctest: +SKIP

The command line is `tinylab` (see `tinylab.__main__`). May import every package; none imports it.
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

    checkpoint = find_checkpoint(Path(run))
    if package_of(checkpoint) == "lm":
        from lm.demo import LanguageModelDemo

        return LanguageModelDemo(checkpoint)
    from classify.demo import ClassifierDemo

    return ClassifierDemo(checkpoint)


def evaluate(run: str | Path, *flags: str) -> dict[str, float]:
    """The metrics of a run's best checkpoint on its validation split, such as ``val/loss`` and ``val/perplexity``.

    Args:
        run: Folder that `fit` has written.
        flags: As on the command line, such as ``"--data.path", "FOLDER"``.

    Raises:
        SystemExit: Bad input; one line on stderr says what.
    """
    from importlib import import_module

    from experiment.runs.reading import find_checkpoint, package_of
    from experiment.runs.run import CONFIG

    checkpoint = find_checkpoint(Path(run))
    main = import_module(f"{package_of(checkpoint)}.__main__").main
    cli = main(["validate", "--config", str(Path(run) / CONFIG), "--ckpt_path", str(checkpoint), *flags])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
