"""Configurations side by side: a run of `fit` for each row of a comparison's file and each seed, and tables of them.

    tinylab compare FILE [--only ROW ...] [--seeds 1 2 3] [--budget seconds=1200] [flags of fit]

What is done is not run again, nor what another comparison has run already; a run that was cut short goes on from its
last checkpoint. The same command in several processes shares the runs among them. Every run leaves a line in
results.jsonl of --out; the lines of other machines count once their file lies there as results-NAME.jsonl.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NoReturn

from experiment.compare.comparison import Comparison, Row, Run, as_value, read_comparison, runs_of
from experiment.compare.differences import show
from experiment.console import console
from experiment.errors import InputError
from experiment.pages.summary import read_metrics
from experiment.runs.provenance import read_record

Line = dict[str, Any]  # what a run left: its key, configuration, machine and figures
STOPPED = "stopped; go on with the same command"
STEPS_TIMED, STEPS_SKIPPED = 20, 5  # the first steps are slower than those that follow


def read_results(out: Path) -> dict[str, Line]:
    """The lines of the runs that ended, by key; of several the last that ended well."""
    found: dict[str, Line] = {}
    for text in "\n".join(file.read_text(encoding="utf-8") for file in sorted(out.glob("results*.jsonl"))).split("\n"):
        with suppress(ValueError):  # empty, or cut by a kill
            line = json.loads(text)
            if "failed" not in line or "failed" in found.get(line["key"], line):
                found[line["key"]] = line
    return found


@contextmanager
def held(file: Path) -> Iterator[int | None]:
    """A lock, for as long as this process or one that it has passed the descriptor to lives; None where it is taken."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield None
    else:
        yield descriptor
    finally:
        os.close(descriptor)


def make_runs(runs: Sequence[Run], out: Path, tested: bool = False) -> dict[str, Line]:
    """Make the runs that no line in `out` tells of yet; those that failed before this call are tried again.

    Args:
        runs: In the order in which they are made.
        out: The folder of all comparisons.
        tested: Whether the best checkpoint is judged on the test split, too.

    Returns:
        The lines by key; that of a run that failed has `failed`, the exit code.
    """

    def done(line: Line | None) -> bool:
        return bool(line) and (line["ended"] > begun if "failed" in line else "test" in line or not tested)

    begun, before = time.time(), read_results(out)
    left: dict[str, Run] = {}  # one for each row that has runs to make
    for run in runs:
        if not done(before.get(run.key)):
            left.setdefault(run.row.name, run)
    facts = {name: prepare(run) for name, run in left.items()}
    judged = {run.row.name: before.get(run.key, {}).get("evaluated") for run in runs}
    judged |= {name: fact.get("evaluated") for name, fact in facts.items()}
    if len(texts := {text: name for name, text in judged.items()}) > 1:
        (text, row), (other, other_row), *_ = texts.items()
        raise InputError(f"{row} would be judged by {text}, but {other_row} by {other}: these do not compare")
    if clocks := {name: timing_of(run) for name, run in left.items() if "seconds" in run.row.budget}:
        timed = make_runs(list(clocks.values()), out)
        facts |= {n: facts[n] | {"seconds_per_step": timed[clocks[n].key].get("seconds_per_step")} for n in clocks}
    flags = {name: budget_flags(left[name].row, facts[name]) for name in left}
    waiting = dict(enumerate(runs, 1))
    while waiting:
        for number, run in list(waiting.items()):
            with held(out / "locks" / run.key) as lock:
                line = read_results(out).get(run.key)
                if lock is None and not done(line):
                    continue  # another process makes it
                note = " (done before)" if done(line) else ""
                console.print(f"run {number} of {len(runs)}: {run.row.name}, seed {run.seed}{note}", style="bold")
                if not done(line):
                    line = make(run, out / "runs" / run.key, flags[run.row.name], facts[run.row.name], lock, tested)
                    with (out / "results.jsonl").open("ab", buffering=0) as file:  # in one piece, for others write too
                        file.write(f"\n{json.dumps(line)}".encode())
            del waiting[number]
        time.sleep(0.5 if waiting else 0)
    return read_results(out)


def timing_of(run: Run) -> Run:
    """A few steps of it, to see how long one takes."""
    short = {"max_steps": STEPS_TIMED, "max_epochs": -1, "limit_val_batches": 0, "log_every_n_steps": 1}
    flags = {**run.flags, **{f"trainer.{name}": value for name, value in short.items()}}
    return replace(run, row=replace(run.row, name=f"time of {run.row.name}", budget={}), flags=flags)


def prepare(run: Run) -> Line:
    """Let fit make all of a run but its training, so that it refuses what it would refuse.

    Returns:
        What a budget needs and who compares wants to know; nothing of a module that is no package of ours.
    """
    found = importlib.util.find_spec(run.row.package)
    if found is None:
        raise InputError(f"row {run.row.name}: package {run.row.package}: expected lm, classify, or a module like them")
    if found.submodule_search_locations is None:
        return {}
    from jsonargparse import ArgumentError  # brings Lightning with what follows, which --help need not wait for

    from experiment.commands.checks import check_training
    from experiment.quiet import quiet_libraries

    quiet_libraries(False)
    kind = importlib.import_module(f"{run.row.package}.cli").CLI
    prepared = type("Prepared", (kind,), {"_run_subcommand": lambda self, subcommand: None})
    try:
        cli = prepared(["fit", *run.arguments, *["--trainer.max_epochs=-1"] * len(run.row.unit)])
        cli.datamodule.setup("fit")
        check_training(cli.trainer, cli.datamodule)
        facts = {**getattr(cli.datamodule, "facts", {})}
    except (InputError, ArgumentError) as error:
        raise InputError(f"row {run.row.name}: {error}") from error
    if "tokens_per_epoch" in facts:
        batches = math.ceil(facts.pop("batches_per_epoch") / cli.trainer.world_size)
        steps = math.ceil(batches / cli.trainer.accumulate_grad_batches)
        facts["tokens_per_step"] = facts.pop("tokens_per_epoch") / steps
    size = sum(parameter.numel() for parameter in cli.model.parameters())
    return {"parameters": size, **facts}


def budget_flags(row: Row, facts: Line) -> list[str]:
    """The flags that end a run with its budget, where its schedule ends too, and validate it `points` times."""
    if row.unit in ([], ["epochs"]):
        return [f"--trainer.max_epochs={row.budget['epochs']}", "--trainer.max_steps=-1"] if row.unit else []
    (unit,) = row.unit
    of_a_step = {"steps": 1, "seconds": facts.get("seconds_per_step"), "tokens": facts.get("tokens_per_step")}
    of_a_step["tokens_per_parameter"] = (of_a_step["tokens"] or math.nan) / facts.get("parameters", math.nan)
    steps = row.budget[unit] / (of_a_step[unit] or math.nan)
    if not 1 <= steps < math.inf:
        why = "are not counted beforehand by" if math.isnan(steps) else f"make {steps:.2g} steps, not one or more, of"
        raise InputError(f"budget: {row.budget[unit]:g} {unit} {why} {row.name}")
    interval = math.ceil(round(steps) / row.budget.get("points", 8))
    trainer = {"max_steps": round(steps), "max_epochs": -1, "check_val_every_n_epoch": "null", "log_every_n_steps": 1}
    trainer["val_check_interval"] = interval
    return [f"--checkpoint.every_n_steps={interval}", *(f"--trainer.{name}={n}" for name, n in trainer.items())]


def make(run: Run, run_dir: Path, flags: Sequence[str], facts: Line, lock: int, tested: bool) -> Line:
    """Train in a process of its own, or go on where a training stopped, and see what it left."""
    line = {"key": run.key, "package": run.row.package, "seed": run.seed, "budget": run.row.budget, **facts}
    line |= {"config": run.config, "arguments": [*run.arguments, *flags]}
    own, environment = [f"--run_dir={run_dir}", "--ckpt_path=last"], {"WANDB_RUN_GROUP": run.group, **os.environ}
    command = [sys.executable, "-m", run.row.package, "fit", *line["arguments"], *own]
    process = subprocess.Popen(command, env=environment, pass_fds=[lock])  # which keeps the lock where this one dies
    try:
        code = process.wait()
    except BaseException as ending:
        if not isinstance(ending, KeyboardInterrupt):  # Ctrl-C has reached it already; told twice, it would not save
            process.terminate()
        process.wait()
        raise
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):  # the run alone was asked to stop
        console.print(STOPPED)
        sys.exit(code)
    if code != 0:
        console.print(f"{run.row.name}, seed {run.seed}, failed with exit code {code}: see above", style="red")
        return line | {"failed": code, "ended": time.time()}
    return line | measure(run, run_dir) | ({"test": test(run, run_dir)} if tested else {}) | {"ended": time.time()}


def measure(run: Run, run_dir: Path) -> Line:
    """Validations of a run, with tokens and seconds of training until each; what it cost, and on what machine."""
    tokens, seconds, rows, record = 0.0, [], read_metrics(run_dir), read_record(run_dir)
    curve: dict[str, list[float]] = {}
    for row in rows:
        if "train/tokens" in row:
            seconds.append((row["train/tokens"] - tokens) / row["train/tokens_per_second"])
            tokens = row["train/tokens"]
        if found := {name: value for name, value in row.items() if name.startswith("val/")}:
            found |= {"step": row["step"], "tokens": tokens, "training_seconds": sum(seconds)}
            for name, value in found.items():
                curve.setdefault(name, []).append(value)
    losses, calls = [row["train/loss"] for row in rows if "train/loss" in row], record.get("calls", [{}])
    epochs = max(1, run.config.get("trainer", {}).get("max_epochs") or 1)
    return {
        "curve": curve, "train/loss": mean(losses[-max(1, len(losses) // epochs) :] or [math.nan]),  # of the last epoch
        "trainable": record.get("parameters", {}).get("trainable"),
        "environment": record.get("environment", {}), "date": calls[-1].get("started", "")[:10],
        "seconds": sum(call["seconds"] for call in calls) if all("seconds" in call for call in calls) else None,
        "memory_mib": max((call["memory_mib"] for call in calls if "memory_mib" in call), default=None),
        "seconds_per_step": median(seconds[STEPS_SKIPPED:]) if len(seconds) > STEPS_SKIPPED else None,
    }  # fmt: skip


def test(run: Run, run_dir: Path) -> dict[str, float]:
    """What the best checkpoint has on the test split; of a module without checkpoints, what its metrics say."""
    if not (run_dir / "checkpoints").is_dir():
        return {name: value for name, value in read_metrics(run_dir)[-1].items() if name.startswith("test/")}
    main = importlib.import_module(f"{run.row.package}.__main__").main
    with contextlib.redirect_stdout(io.StringIO()):
        cli = main(["test", f"--config={run_dir / 'config.yaml'}", "--ckpt_path=best", f"--run_dir={run_dir}"])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("test/")}


class Parser(argparse.ArgumentParser):
    """Errors are of one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def read_arguments(args: Sequence[str] | None) -> tuple[Comparison, list[Run], Path]:
    """The comparison that the command line asks for, its runs, and the folder of all comparisons."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser("tinylab compare", description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="such as configs/comparisons/recipes.yaml; or one of `wandb sweep`")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to make, by default all")
    parser.add_argument("--rows", nargs="+", metavar="CONFIG", help="instead of the file's: A.yaml B.yaml,OVER_B.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run each, by default the file's")
    parser.add_argument("--budget", nargs="+", metavar="UNIT=N", help="instead of the file's: seconds=1200 points=8")
    parser.add_argument("--out", type=Path, default=Path("runs/comparisons"), help="by default %(default)s")
    options, words = parser.parse_known_args(args)
    comparison = read_comparison(options.file)
    rows = {row.name: row for row in comparison.rows}
    if options.rows:
        plain = replace(comparison.rows[0], flags={}, title="", shows="", group="")
        sets = {"+".join(Path(file).stem for file in files.split(",")): files.split(",") for files in options.rows}
        if len(sets) < len(options.rows):
            raise InputError(f"--rows {' '.join(options.rows)}: two would have the same name: rename a configuration")
        rows = {name: replace(plain, name=name, configs=files) for name, files in sets.items()}
    if unknown := [name for name in options.only or () if name not in rows]:
        raise InputError(f"--only {unknown[0]}: there is no such row; expected some of {', '.join(rows)}")
    chosen = [rows[name] for name in options.only or rows]
    if options.budget:
        given = {name: as_value(value) for name, _, value in (word.partition("=") for word in options.budget)}
        chosen = [replace(row, budget={"points": row.budget.get("points", 8)} | given) for row in chosen]
    baseline = comparison.baseline if comparison.baseline in {row.name for row in chosen} else None
    comparison = replace(comparison, rows=chosen, baseline=baseline, seeds=options.seeds or comparison.seeds)
    return comparison, runs_of(comparison, words), options.out


def compare(args: Sequence[str] | None) -> None:
    comparison, runs, out = read_arguments(args)
    lines = make_runs(runs, out, any(name.startswith("test/") for name in comparison.report))
    results = {row.name: [lines[run.key] for run in runs if run.row.name == row.name] for row in comparison.rows}
    show(comparison, results, out)
    if any("failed" in lines[run.key] for run in runs):
        sys.exit(1)


def main(args: Sequence[str] | None = None) -> None:
    """Run a comparison. Exit code 1 where a run failed, 2 and one line on stderr where the input is bad; SIGTERM and
    Ctrl-C let the run in progress save and stop, so that the same command goes on from there."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        compare(args)
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
