"""``tinylab summary RUN [RUN …]``: a table of runs and their results, and where their files are."""

import csv
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from experiment.command_parser import CommandParser, one_line_errors
from experiment.console import console
from experiment.runs.provenance import missing_run

# The metrics shown if a run has them; the direction decides which value is best.
FIGURES = {"val/loss": min, "val/perplexity": min, "val/bits_per_byte": min, "val/accuracy": max, "val/f1": max}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, each with the values that were logged at its step.

    An incomplete last row, being written or cut off by a kill, is left out.

    Raises:
        InputError: The folder holds no metrics.csv.
    """
    file = run / "metrics.csv"
    if not file.is_file():
        raise missing_run(run, "metrics.csv")
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values() and None not in row]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without a line cut off by a kill; empty if there is no file."""
    found = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def best(rows: list[dict[str, float]], name: str) -> float | None:
    """The best value of a validation metric over a run; None if it was never logged."""
    values = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
    return FIGURES[name](values) if values else None


def summarize(runs: list[Path]) -> None:
    """Print a row for each run, a prediction of each, and the files."""
    results = {run: read_metrics(run) for run in runs}
    shown = [name for name in FIGURES if any(best(rows, name) is not None for rows in results.values())]
    title = "What was trained, and its best validation"
    table = Table("run", "steps", *(name.removeprefix("val/") for name in shown), title=title, title_justify="left")
    for run, rows in results.items():
        values = [best(rows, name) for name in shown]
        steps = int(rows[-1]["step"]) if rows else 0
        table.add_row(run.name, f"{steps:,}", *("" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    for run in runs:
        for first in read_lines(run / "predictions.jsonl")[:1]:
            label = f" → {first['label']}" if "label" in first else ""
            console.print(f"\n{run.name} says:", style="dim")
            console.print(first["text"] + label)
    console.print("\nEverything is in", style="dim")
    for run in runs:
        files = ", ".join(sorted(path.name for path in run.iterdir() if path.name != "wandb" and path.name[0] != "."))
        console.print(f"  {run}/  {files}")


@one_line_errors()
def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    parser = CommandParser("tinylab summary", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder written by fit")
    summarize(parser.parse_args(args).runs)


if __name__ == "__main__":
    main()
