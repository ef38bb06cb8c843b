"""metrics.csv: every logged step of a run as one row."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from experiment.errors import InputError


class MetricsFile(Logger):
    """Writes ``metrics.csv`` into the run's folder: a ``step`` column (optimizer steps done), one row a logged step.

    Lightning's CSVLogger writes one row for each call, so that training and validation figures of the same step
    stand apart, and starts the file anew when a run is resumed. Here they share a row, and a resumed run goes on
    after the step of its checkpoint: what the killed run had written past it is dropped and comes again.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "metrics.csv"
        self._columns: list[str] = ["step"]
        self._row: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self.file.parent.name

    @property
    def version(self) -> str:
        return ""

    @property
    def log_dir(self) -> str:
        return str(self.file.parent)

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them already."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``, which a run resumed from there will write again."""
        rows = [row for row in self._read() if int(row["step"]) <= step]
        self._row = {}
        self._write_all(rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # Lightning counts the steps from 0 and logs the first one as step 0; people count what is done.
        step = (step or 0) + 1
        if self._row and self._row["step"] != step:
            self.save()
        self._row |= {"step": step, **{name: value for name, value in metrics.items() if name != "epoch"}}

    @rank_zero_only
    def save(self) -> None:
        if not self._row:
            return
        new = [name for name in self._row if name not in self._columns]
        try:
            if new or not self.file.exists():
                rows = self._read()
                self._columns += sorted(new)
                self._write_all(rows)
            with self.file.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(self._row)
        except OSError as error:
            raise InputError(
                f"{self.file} cannot be written ({error.strerror}): free space or choose another run_dir"
            ) from error
        self._row = {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            reader = csv.DictReader(stream)
            rows = [row for row in reader if row["step"] and None not in row.values()]
            self._columns = list(reader.fieldnames or ["step"])
        return rows

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        with partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.file)
