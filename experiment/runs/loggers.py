"""The base class of a run's loggers, and the one that is always active: metrics.csv."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from experiment.errors import InputError


class RunLogger(Logger):
    """A logger that belongs to one run, counts its optimizer steps, and accepts tables."""

    trainer: Trainer | None = None  # whose steps are counted; Lightning's own count starts at 0

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml already has them."""

    def check(self) -> None:
        """Called before anything is written.

        Raises:
            InputError: This logger cannot be used.
        """

    def begin(self, trainer: Trainer, run: Path, package: str, record: Mapping[str, Any], step: int) -> None:
        """Start or continue; called in the first process, before training.

        Args:
            trainer: The trainer whose steps are counted.
            run: The run's folder, with its config.yaml.
            package: lm or classify.
            record: Of run.json: parameter counts, environment and commands.
            step: Optimizer steps of the checkpoint that the run continues from; later rows will be logged again.
        """
        self.trainer = trainer

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table, replacing an earlier one with this key."""

    def end(self, run: Path) -> None:
        """Finish; called in the first process, after training."""


class MetricsFile(RunLogger):
    """Writes ``metrics.csv`` to the run's folder: a ``step`` column (optimizer steps done), one row per logged step.

    Lightning's CSVLogger writes one row for each call, so that training and validation metrics of the same step
    are in different rows, and restarts the file on a resume. Here they share a row, and a resumed run continues
    after the step of its checkpoint: later rows of the killed run are dropped and written again.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "metrics.csv"
        self._columns: list[str] = ["step"]
        self._row: dict[str, Any] = {}  # the newest row; it is in the file already, from this byte on
        self._row_start = 0

    @property
    def log_dir(self) -> str:
        return str(self.file.parent)

    save_dir = log_dir

    def begin(self, trainer: Trainer, run: Path, package: str, record: Mapping[str, Any], step: int) -> None:
        super().begin(trainer, run, package, record, step)
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``, which a run resumed from there will write again."""
        if self.file.exists():
            rows = [row for row in self._read() if int(row["step"]) <= step]
            self._write_all(rows)
            self._row = {**rows[-1], "step": int(rows[-1]["step"])} if rows else {}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = self.trainer.global_step if self.trainer is not None else step
        try:
            if new := [name for name in metrics if name not in self._columns and name != "epoch"]:
                rows = self._read()
                self._columns += sorted(new)
                self._write_all(rows)
            same_row = self._row.get("step") == step
            self._row = {**(self._row if same_row else {"step": step}), **metrics}
            with self.file.open("r+", newline="", encoding="utf-8") as stream:
                self._row_start = stream.seek(self._row_start if same_row else 0, 0 if same_row else 2)
                stream.truncate()
                csv.DictWriter(stream, self._columns, extrasaction="ignore").writerow(self._row)
        except OSError as error:
            raise InputError(
                f"{self.file} cannot be written ({error.strerror}): free space or choose another run_dir"
            ) from error

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows = [row for row in reader if row["step"] and None not in row.values()]
            self._columns = list(reader.fieldnames or ["step"])
        return rows

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            for row in rows:
                self._row_start = stream.tell()
                writer.writerow(row)
        partial.replace(self.file)
