"""Makes the runs of a comparison: `tinylab compare --help`."""

import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from experiment.command_parser import one_line_errors
from experiment.compare.comparison import Line, Run, read_comparison
from experiment.compare.differences import show
from experiment.console import console
from experiment.errors import InputError
from experiment.invocation import command
from experiment.pages.summary import read_lines, read_metrics
from experiment.quiet import quiet_libraries
from experiment.runs.provenance import read_record
from experiment.runs.run import holds_run

TIMED_STEPS, SKIPPED = 20, 5  # to time a step; the first steps are slower than the rest


def read_results(out: Path, tested: bool = False) -> dict[str, Line]:
    """The lines of successful runs, by key; with `tested`, only those evaluated on the test split."""
    lines = [line for file in sorted(out.glob("results*.jsonl")) for line in read_lines(file)]
    return {line["key"]: line for line in lines if "failed" not in line and ("test" in line or not tested)}


def make_runs(runs: Sequence[Run], out: Path, variables: Mapping[str, str], tested: bool = False) -> dict[str, Line]:
    """Make the runs that have no line in `out` yet, and return all lines by key. The environment has the `variables`
    that the user has not set. With `tested`, the best checkpoint is also evaluated on the test split. The line of a run
    that failed has `failed`, the exit code, and is not saved: the next call retries it."""
    before, made = read_results(out, tested), {}
    left = {run.name: run for run in runs if run.key not in before}  # one of each row
    facts = {name: prepare(run) for name, run in left.items()}
    judged = {facts.get(run.name, before.get(run.key, {})).get("evaluated"): run.name for run in runs}
    if len(judged) > 1:
        raise InputError("rows are evaluated on " + " and ".join(f"{text} ({row})" for text, row in judged.items()))
    for name, run in left.items():
        if "seconds" in run.budget:
            budget, training = {"steps": TIMED_STEPS, "points": 1}, {**run.flags, "trainer.limit_val_batches": 0}
            clock = replace(run, name=f"time of {name}", seed=runs[0].seed, budget=budget, flags=training)
            facts[name]["seconds_per_step"] = make_runs([clock], out, variables)[clock.key].get("seconds_per_step")
    flags = {name: budget_flags(run, facts[name]) for name, run in left.items()}
    for patience in (0, -1):  # first the runs no other process works on; then those that others made or abandoned
        for number, run in enumerate(runs, 1):
            with suppress(Timeout), FileLock(out / "locks" / run.key, timeout=patience):
                if run.key in made | read_results(out, tested):
                    continue
                console.print(f"run {number} of {len(runs)}: {run.name}, seed {run.seed}", style="bold")
                words = [*run.arguments, *flags[run.name]]
                line = {"key": run.key, "package": run.package, "seed": run.seed, "budget": run.budget}
                line |= facts[run.name] | {"config": run.config, "arguments": words}
                made[run.key] = line | make(run, words, out / "runs" / run.key, variables, tested)
                if "failed" not in made[run.key]:
                    with (out / "results.jsonl").open("ab", buffering=0) as file:  # in one write: others write too
                        file.write(f"\n{json.dumps(made[run.key])}".encode())
    return made | read_results(out, tested)


def prepare(run: Run) -> Line:
    """Prepare a run as fit does, without training, so that mistakes are found early. Returns what a budget and the
    comparison need to know; nothing for a module outside our packages."""
    try:
        parser = importlib.import_module(f"{run.package}.cli").CLI  # imports Lightning, which --help does not need
    except ModuleNotFoundError as error:
        if error.name == f"{run.package}.cli":
            return {}
        raise InputError(f"row {run.name}: package {run.package}: expected lm or classify") from error
    skipped = dict.fromkeys(("fit", "after_fit"), lambda self, **_: None) | {"before_fit": parser.check_fit}
    try:
        ending = ["--trainer.max_epochs=-1", "--trainer.max_steps=1"] if run.budget else []  # while it is unknown
        cli = type("Checked", (parser,), skipped)(["fit", *run.arguments, *ending])
        facts = {**getattr(cli.datamodule, "facts", {})}
    except (InputError, ArgumentError) as error:
        raise InputError(f"row {run.name}: {error}") from error
    if "tokens_per_epoch" in facts:
        batches = math.ceil(facts.pop("batches_per_epoch") / cli.trainer.world_size)
        steps = math.ceil(batches / cli.trainer.accumulate_grad_batches)
        facts["tokens_per_step"] = facts.pop("tokens_per_epoch") / steps
    return {"parameters": sum(parameter.numel() for parameter in cli.model.parameters()), **facts}


def budget_flags(run: Run, facts: Line) -> list[str]:
    """The flags that end a run and its schedule at the budget, and validate it `points` times."""
    unit = next((name for name in run.budget if name != "points"), None)
    if unit is None:
        return []
    number, tokens = run.budget[unit], facts.get("tokens_per_step")
    if unit == "epochs":
        return [f"--trainer.max_epochs={number}", "--trainer.max_steps=-1"]
    of_a_step = {"steps": 1, "tokens": tokens, "seconds": facts.get("seconds_per_step")}
    of_a_step["tokens_per_parameter"] = tokens and tokens / facts["parameters"]
    if not of_a_step[unit]:
        raise InputError(f"budget: {number:g} {unit} cannot be counted in advance for {run.name}")
    if (steps := round(number / of_a_step[unit])) < 1:
        raise InputError(f"budget: {number:g} {unit} are less than half a step of {run.name}")
    every = math.ceil(steps / run.budget.get("points", 8))
    trainer = {"max_steps": steps, "max_epochs": -1, "val_check_interval": every, "check_val_every_n_epoch": "null"}
    words = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    return [*words, "--trainer.log_every_n_steps=1", f"--checkpoint.every_n_steps={every}"]


def make(run: Run, arguments: Sequence[str], folder: Path, variables: Mapping[str, str], tested: bool) -> Line:
    """Train in a separate process, resuming an interrupted run, and collect the results."""
    with FileLock(folder / ".lock"):  # wait for a run whose comparison was killed
        pass
    command = [sys.executable, "-m", run.package, "fit", *arguments, f"--run_dir={folder}"]
    command += ["--ckpt_path=last"] if holds_run(folder) else []
    process = subprocess.Popen(command, env={**variables, **os.environ})
    try:
        code = process.wait()
    except BaseException as ending:
        if not isinstance(ending, KeyboardInterrupt):  # it got Ctrl-C too; a second signal would stop its saving
            process.terminate()
        sys.exit(143 if process.wait() in (143, -signal.SIGTERM) else 130)
    if code in (130, 143, -signal.SIGINT):  # stopped, and has printed how to resume
        sys.exit(code)
    if code != 0:
        console.print(f"{run.name}, seed {run.seed}, failed with exit code {code}: see above", style="red")
        return {"failed": code}
    return measure(run, folder) | ({"test": test(run, folder)} if tested else {})


def measure(run: Run, folder: Path) -> Line:
    """The validations of a run, with tokens and training seconds at each; its cost and its machine."""
    frame, record = pd.DataFrame(read_metrics(folder)), read_record(folder)
    steps = frame.reindex(columns=["train/tokens", "train/tokens_per_second"]).dropna()
    seconds = steps["train/tokens"].diff().fillna(steps["train/tokens"]) / steps["train/tokens_per_second"]
    sums = frame[["step"]].assign(tokens=steps["train/tokens"], training_seconds=seconds.cumsum()).ffill().fillna(0)
    losses, epochs = frame.filter(["train/loss"]).dropna(), run.config.get("trainer", {}).get("max_epochs") or 1
    calls = record.get("calls", [{}])
    return {
        "curve": sums.join(frame.filter(regex="^val/").dropna(how="all"), how="inner").to_dict("list"),
        "train/loss": losses.tail(max(1, len(losses) // max(1, epochs))).mean().get("train/loss"),  # of the last epoch
        "trainable": record.get("parameters", {}).get("trainable"),
        "environment": record.get("environment", {}), "date": calls[-1].get("started", "")[:10],
        "seconds": sum(call.get("seconds", 0) for call in calls) or None,
        "memory_mib": max(call.get("memory_mib", 0) for call in calls) or None,
        "seconds_per_step": seconds[SKIPPED:].median() if len(seconds) > SKIPPED else None,
    }  # fmt: skip


def test(run: Run, folder: Path) -> dict[str, float]:
    """The best checkpoint's test metrics; for a module without checkpoints, those it logged."""
    figures = read_metrics(folder)[-1]
    if (folder / "checkpoints").is_dir():
        main = importlib.import_module(f"{run.package}.__main__").main
        cli = main(["test", f"--config={folder / 'config.yaml'}", "--ckpt_path=best", f"--run_dir={folder}"])
        figures = cli.trainer.callback_metrics
    return {name: float(value) for name, value in figures.items() if name.startswith("test/")}


@one_line_errors()
def main(args: Sequence[str] | None = None) -> None:
    """Run a comparison. Exit code 1 if a run failed, 2 and one line on stderr if the input is bad; SIGTERM and
    Ctrl-C let the current run save and print how to resume."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    comparison, out = read_comparison(args)
    quiet_libraries()
    runs = [replace(row, seed=seed) for seed in dict.fromkeys(comparison.seeds) for row in comparison.rows]
    again = f"{command('compare')} {shlex.join(sys.argv[1:] if args is None else args)}"
    variables = {"WANDB_RUN_GROUP": comparison.name, "TINYLAB_RESUME": again}  # what a stopped run prints
    found = make_runs(runs, out, variables, any(name.startswith("test/") for name in comparison.report))
    lines = [found[run.key] | {"row": run.name} for run in runs]
    show(comparison, lines, out)
    if any("failed" in line for line in lines):
        sys.exit(1)
