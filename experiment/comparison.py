"""Configurations side by side: a run for each and every seed, one process at a time, and tables of what they gave.

Each run leaves one line in results.jsonl of the comparison's folder. What stands there is not run again, and a run that
was cut short goes on from its last checkpoint, so that a comparison is always continued by the same command.
"""

import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NoReturn

import yaml
from rich import box
from rich.table import Table

from experiment.console import console
from experiment.errors import InputError

Line = dict[str, Any]  # what a run left: its key, name and seed, and its figures
Columns = Mapping[str, tuple[str, str]]  # name of a figure: title of its column, format
RESERVED = ("--run_dir", "--ckpt_path", "--seed_everything")  # flags of fit that each run has its own of
STOPPED = "stopped; go on with the same command"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: Of the row that it belongs to.
        stem: What its key begins with; equal runs of two rows have the same.
        seed: Also among the arguments.
        arguments: What follows ``fit`` on its command line.
    """

    name: str
    stem: str
    seed: int
    arguments: Sequence[str]

    @cached_property
    def key(self) -> str:
        """Tells runs apart by their arguments and the content of the configurations among these."""
        paths = [a.removeprefix("--config=") for a in self.arguments if a.startswith("--config=")]
        configs = [yaml.safe_load(read_config(path)) for path in paths]  # without comments, which change no result
        digest = hashlib.sha256(json.dumps([self.arguments, configs]).encode()).hexdigest()
        return f"{self.stem}-seed{self.seed}-{digest[:8]}"


def read_config(path: str | Path) -> str:
    """The text of a configuration.

    Raises:
        InputError: There is none.
    """
    if not Path(path).is_file():
        raise InputError(f"the configuration {path} does not exist: run this from the folder that holds configs/")
    return Path(path).read_text(encoding="utf-8")


def read_results(out: Path) -> dict[str, Line]:
    """The lines of finished runs, by key."""
    found = {}
    if (out / "results.jsonl").is_file():
        for text in (out / "results.jsonl").read_text().split("\n"):
            with suppress(ValueError):  # empty, or cut by a kill
                line = json.loads(text)
                found[line["key"]] = line
    return found


def make_runs(runs: Sequence[Run], out: Path, measure: Callable[[Run, Path], Line]) -> dict[str, list[Line]]:
    """Make the runs that ``out`` has no line of yet.

    Args:
        runs: In the order in which they are made.
        out: The comparison's folder.
        measure: Makes a run in the folder it is given, and returns its figures.

    Returns:
        The lines of each row, in the order of its runs.
    """
    out.mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        done = run.key in read_results(out)
        before = " (done before)" if done else ""
        console.print(f"[bold]run {number} of {len(runs)}[/bold]: {run.name}, seed {run.seed}{before}")
        if not done:
            line = {"key": run.key, "name": run.name, "seed": run.seed, **measure(run, out / "runs" / run.key)}
            with (out / "results.jsonl").open("a") as file:
                file.write("\n" + json.dumps(line))
    lines, rows = read_results(out), {}
    for run in runs:
        rows.setdefault(run.name, []).append(lines[run.key])
    return rows


def fit(package: str, arguments: Sequence[str], run_dir: Path) -> Line:
    """``python -m package fit`` in a process of its own, so that its memory can be read; or go on where one stopped.

    Returns:
        ``seconds`` of wall time and ``cpu_seconds``, which are comparable on a busy machine too (None where the run
        had begun before), and ``memory_mib``, the peak.

    Raises:
        InputError: The run fails.
        SystemExit: The run was asked to stop.
    """
    resumed = (run_dir / "checkpoints" / "last.ckpt").exists()
    command = [sys.executable, "-m", package, "fit", *arguments, f"--run_dir={run_dir}", "--ckpt_path=last"]
    environment = os.environ | {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or run_dir.parent.parent.name}
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException as ending:
        if not isinstance(ending, KeyboardInterrupt):  # Ctrl-C has reached it already; told twice, it would not save
            process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # the run alone was asked to stop
        console.print(STOPPED)
        sys.exit(process.returncode)
    if process.returncode != 0:
        raise InputError(f"the run {run_dir} ended with exit code {process.returncode}: see above; {' '.join(command)}")
    return {
        "seconds": None if resumed else time.monotonic() - start,
        "cpu_seconds": None if resumed else usage.ru_utime + usage.ru_stime,
        "memory_mib": usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20),
    }


# ------------------------------------------------------------------------------------------------------- the tables


def spread(lines: Sequence[Line], figure: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the seeds; None where there is nothing to take it of."""
    values = [line[figure] for line in lines if line.get(figure) is not None]
    return (mean(values) if values else None), (stdev(values) if len(values) > 1 else None)


def cells(lines: Sequence[Line], columns: Columns) -> list[str]:
    """Each figure as ``mean ± standard deviation``, without the second where all seeds agree."""
    row = []
    for figure, (_, form) in columns.items():
        middle, deviation = spread(lines, figure)
        shown = "" if middle is None else f"{middle:{form}}"
        row.append(f"{shown} ± {deviation:{form}}" if deviation else shown)
    return row


def write_table(
    file: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> None:
    """Print a table with notes below it, and write it as Markdown and CSV to ``file`` with these endings."""
    table = Table(
        title=title,
        title_justify="left",
        caption="\n".join(notes),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # narrow, since a pipe has 80 columns
    )
    for name, *values in zip(header, *rows, strict=True):
        table.add_column(name, overflow="fold", min_width=max(map(len, " ".join([name, *values]).split())))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows)]
    file.with_suffix(".md").write_text("".join([*lines, *(f"\n{note}\n" for note in notes)]), encoding="utf-8")
    with file.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


# ------------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """A comparison's own options; its help is the description as it is written, its errors are of one line."""

    def __init__(self, prog: str, description: str, usage: str | None = None) -> None:
        super().__init__(
            prog, usage, description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def fit_flags(given: Sequence[str], reserved: Sequence[str] = RESERVED) -> list[str]:
    """What a comparison passes on to every fit, ``--name value`` as ``--name=value``.

    Raises:
        InputError: A flag that the comparison sets itself, or a word that is no flag.
    """
    flags: list[str] = []
    for word in given:
        if word.startswith("--"):
            flags.append(word)
        elif flags and "=" not in flags[-1]:
            flags[-1] += f"={word}"
        else:
            raise InputError(f"{word}: expected a flag of fit, such as --data.batch_size=8")
    if taken := [flag for flag in flags if flag.partition("=")[0] in reserved]:
        raise InputError(f"{taken[0].partition('=')[0]} is set for each run: use the comparison's own options, --help")
    return flags


@contextmanager
def command_line() -> Iterator[None]:
    """Bad input ends with one line on stderr and exit code 2; SIGTERM and Ctrl-C let the run in progress save and stop,
    so that the same command goes on from there."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = error.filename or "the comparison's folder"
        print(f"error: {place} cannot be written ({error.strerror}): choose another with --out", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print(STOPPED)
        sys.exit(130)
