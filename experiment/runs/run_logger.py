"""What every logger of a run has in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger


class RunLogger(Logger):
    """A logger that belongs to one run, counts its optimizer steps, and takes tables."""

    trainer: Trainer | None = None  # whose steps are counted; Lightning's own count begins at 0

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them already."""

    def check(self) -> None:
        """Called before anything is written.

        Raises:
            InputError: This logger cannot be used.
        """

    def begin(self, trainer: Trainer, run: Path, package: str, record: Mapping[str, Any], step: int) -> None:
        """Start or continue; called in the first process, before training.

        Args:
            trainer: Whose steps are counted.
            run: The run's folder, with its config.yaml.
            package: lm or classify.
            record: Of run.json: parameter counts, environment and commands.
            step: Optimizer steps of the checkpoint that the run continues from; what was logged after it comes again.
        """
        self.trainer = trainer

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in the place of an earlier one of this key."""

    def end(self, run: Path) -> None:
        """Finish; called in the first process, after training."""
