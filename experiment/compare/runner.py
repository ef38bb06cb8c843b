"""Makes the runs of a comparison: `tinylab compare --help`."""

import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from experiment.command_parser import one_line_errors
from experiment.compare.comparison import Row, Run, read_comparison
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
        with contextlib.suppress(ValueError):  # empty, or cut by a kill
            line = json.loads(text)
            if "failed" not in line or "failed" in found.get(line["key"], line):
                found[line["key"]] = line
    return found


def make_runs(runs: Sequence[Run], out: Path, group: str, tested: bool = False) -> dict[str, Line]:
    """Make the runs that no line in `out` tells of yet, in order; those that failed before this call are tried again.

    W&B has them as `group`. With `tested`, the best checkpoint is judged on the test split, too. The lines come by key;
    that of a run that failed has `failed`, the exit code.
    """

    def done(line: Line | None) -> bool:
        return bool(line) and (line["ended"] > begun if "failed" in line else "test" in line or not tested)

    begun, before = time.time(), read_results(out)
    left: dict[str, Run] = {}  # one for each row that has runs to make
    for run in runs:
        if not done(before.get(run.key)):
            left.setdefault(run.row.name, run)
    facts = {name: prepare(run) for name, run in left.items()}
    judged = {facts.get(run.row.name, before.get(run.key, {})).get("evaluated"): run.row.name for run in runs}
    if len(judged) > 1:
        named = ", ".join(f"{row} would be judged by {text}" for text, row in judged.items())
        raise InputError(f"{named}: these do not compare")
    clocks = {name: timing_of(run) for name, run in left.items() if run.row.unit == "seconds"}
    timed = make_runs([*clocks.values()], out, group) if clocks else {}
    for name, clock in clocks.items():
        facts[name]["seconds_per_step"] = timed[clock.key].get("seconds_per_step")
    flags = {name: budget_flags(run.row, facts[name]) for name, run in left.items()}
    (out / "locks").mkdir(parents=True, exist_ok=True)
    waiting = dict(enumerate(runs, 1))
    while waiting:
        for number, run in list(waiting.items()):
            name, folder = run.row.name, out / "runs" / run.key
            with contextlib.suppress(Timeout), FileLock(out / "locks" / run.key, timeout=0):  # else another makes it
                line = read_results(out).get(run.key)
                note = " (done before)" if done(line) else ""
                console.print(f"run {number} of {len(runs)}: {name}, seed {run.seed}{note}", style="bold")
                if not done(line):
                    line = {"key": run.key, "package": run.row.package, "seed": run.seed, "budget": run.row.budget}
                    line |= facts[name] | {"config": run.row.config, "arguments": [*run.arguments, *flags[name]]}
                    line |= make(run, line["arguments"], folder, group, tested) | {"ended": time.time()}
                    with (out / "results.jsonl").open("ab", buffering=0) as file:  # in one piece, for others write too
                        file.write(f"\n{json.dumps(line)}".encode())
                del waiting[number]
        time.sleep(0.5 if waiting else 0)
    return read_results(out)


def timing_of(run: Run) -> Run:
    """A few steps of it, to see how long one takes."""
    short = {"max_steps": STEPS_TIMED, "max_epochs": -1, "limit_val_batches": 0, "log_every_n_steps": 1}
    flags = {**run.row.flags, **{f"trainer.{name}": value for name, value in short.items()}}
    return replace(run, row=replace(run.row, name=f"time of {run.row.name}", budget={}, flags=flags))


def prepare(run: Run) -> Line:
    """Let fit make all of a run but its training, so that it refuses what it would refuse; what a budget needs and who
    compares wants to know, which is nothing of a module that is no package of ours."""
    found = importlib.util.find_spec(run.row.package)
    if found is None:
        raise InputError(f"row {run.row.name}: package {run.row.package}: expected lm, classify, or a module like them")
    if found.submodule_search_locations is None:
        return {}
    from experiment.quiet import quiet_libraries

    quiet_libraries(False)
    kind = importlib.import_module(f"{run.row.package}.cli").CLI
    prepared = type("Prepared", (kind,), dict.fromkeys(("before_fit", "fit", "after_fit"), lambda self, **_: None))
    try:
        cli = prepared(["fit", *run.arguments, *["--trainer.max_epochs=-1"] * (run.row.unit is not None)])
        cli.datamodule.setup("fit")
        cli.datamodule.check(cli.trainer)
        facts = {**getattr(cli.datamodule, "facts", {})}
    except (InputError, ArgumentError) as error:
        raise InputError(f"row {run.row.name}: {error}") from error
    if "tokens_per_epoch" in facts:
        batches = math.ceil(facts.pop("batches_per_epoch") / cli.trainer.world_size)
        steps = math.ceil(batches / cli.trainer.accumulate_grad_batches)
        facts["tokens_per_step"] = facts.pop("tokens_per_epoch") / steps
    return {"parameters": sum(parameter.numel() for parameter in cli.model.parameters()), **facts}


def budget_flags(row: Row, facts: Line) -> list[str]:
    """The flags that end a run with its budget, where its schedule ends too, and validate it `points` times."""
    if row.unit is None:
        return []
    if row.unit == "epochs":
        return [f"--trainer.max_epochs={row.budget['epochs']}", "--trainer.max_steps=-1"]
    tokens, number = facts.get("tokens_per_step"), row.budget[row.unit]
    of_a_step = {"steps": 1, "tokens": tokens, "seconds": facts.get("seconds_per_step")}
    of_a_step["tokens_per_parameter"] = tokens and tokens / facts["parameters"]
    if not of_a_step[row.unit]:
        raise InputError(f"budget: {number:g} {row.unit} are not counted beforehand by {row.name}")
    if (steps := round(number / of_a_step[row.unit])) < 1:
        raise InputError(f"budget: {number:g} {row.unit} make less than half a step of {row.name}")
    every = math.ceil(steps / row.budget.get("points", 8))
    trainer = {"max_steps": steps, "max_epochs": -1, "val_check_interval": every, "check_val_every_n_epoch": "null"}
    flags = {"checkpoint.every_n_steps": every, **{f"trainer.{name}": value for name, value in trainer.items()}}
    return [*(f"--{name}={value}" for name, value in flags.items()), "--trainer.log_every_n_steps=1"]


def make(run: Run, arguments: Sequence[str], folder: Path, group: str, tested: bool) -> Line:
    """Train in a process of its own, or go on where a training stopped, and see what it left."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a run whose comparison was killed is waited for
        pass
    command = [sys.executable, "-m", run.row.package, "fit", *arguments, f"--run_dir={folder}", "--ckpt_path=last"]
    process = subprocess.Popen(command, env={"WANDB_RUN_GROUP": group, **os.environ})
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
        return {"failed": code}
    return measure(run, folder) | ({"test": test(run, folder)} if tested else {})


def measure(run: Run, folder: Path) -> Line:
    """Validations of a run, with tokens and seconds of training until each; what it cost, and on what machine."""
    frame, record = pd.DataFrame(read_metrics(folder)), read_record(folder)
    steps = frame.reindex(columns=["train/tokens", "train/tokens_per_second"]).dropna()
    seconds = steps["train/tokens"].diff().fillna(steps["train/tokens"]) / steps["train/tokens_per_second"]
    sums = {"tokens": steps["train/tokens"], "training_seconds": seconds.cumsum()}
    frame = frame.assign(**{name: values.reindex(frame.index).ffill().fillna(0) for name, values in sums.items()})
    validated = [name for name in frame if name.startswith("val/")]
    losses, calls = frame.get("train/loss", pd.Series(dtype=float)).dropna(), record.get("calls", [{}])
    epochs = max(1, run.row.config.get("trainer", {}).get("max_epochs") or 1)
    return {
        "curve": frame.dropna(subset=validated, how="all")[["step", *sums, *validated]].to_dict("list"),
        "train/loss": losses[-max(1, len(losses) // epochs) :].mean(),  # of the last epoch
        "trainable": record.get("parameters", {}).get("trainable"),
        "environment": record.get("environment", {}), "date": calls[-1].get("started", "")[:10],
        "seconds": sum(call["seconds"] for call in calls) if all("seconds" in call for call in calls) else None,
        "memory_mib": max((call["memory_mib"] for call in calls if "memory_mib" in call), default=None),
        "seconds_per_step": seconds[STEPS_SKIPPED:].median() if len(seconds) > STEPS_SKIPPED else None,
    }  # fmt: skip


def test(run: Run, folder: Path) -> dict[str, float]:
    """What the best checkpoint has on the test split; of a module without checkpoints, what its metrics say."""
    if not (folder / "checkpoints").is_dir():
        return {name: value for name, value in read_metrics(folder)[-1].items() if name.startswith("test/")}
    main = importlib.import_module(f"{run.row.package}.__main__").main
    with contextlib.redirect_stdout(io.StringIO()):
        cli = main(["test", f"--config={folder / 'config.yaml'}", "--ckpt_path=best", f"--run_dir={folder}"])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("test/")}


@one_line_errors()
def main(args: Sequence[str] | None = None) -> None:
    """Run a comparison. Exit code 1 where a run failed, 2 and one line on stderr where the input is bad; SIGTERM and
    Ctrl-C let the run in progress save and stop, so that the same command goes on from there."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    comparison, out = read_comparison(args)
    runs = [Run(row, seed) for seed in comparison.seeds for row in comparison.rows]
    try:
        found = make_runs(runs, out, comparison.name, any(name.startswith("test/") for name in comparison.report))
    except KeyboardInterrupt:
        console.print(STOPPED)
        sys.exit(130)
    lines = [found[Run(row, seed).key] | {"row": row.name} for row in comparison.rows for seed in comparison.seeds]
    show(comparison, lines, out)
    if any("failed" in line for line in lines):
        sys.exit(1)
