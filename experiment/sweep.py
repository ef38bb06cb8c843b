"""``python -m experiment.sweep FILE``: the grid of a W&B sweep's file, run here without a server, and a table of it.

The same file is understood by ``wandb sweep``. Each combination becomes a run of its own under
runs/sweeps/<name of the sweep>; those that are finished are not run again, so that a sweep may be interrupted.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from experiment.console import console
from experiment.errors import InputError
from experiment.provenance import read_record
from experiment.summary import read_metrics

ROOT = Path("runs/sweeps")
BETTER = {"minimize": min, "maximize": max}


def read_sweep(file: Path) -> dict[str, Any]:
    """The content of a sweep's file.

    Raises:
        InputError: It is missing, or no grid that can be run.
    """
    try:
        sweep = yaml.safe_load(file.read_text(encoding="utf-8"))
        missing = [key for key in ("metric", "parameters", "command") if key not in sweep]
        if missing or "${args}" not in sweep["command"]:
            raise InputError(f"{file} has no {missing[0] if missing else '${args} in its command'}: see configs/sweeps")
        if sweep.get("method") != "grid":
            raise InputError(f"{file} has the method {sweep.get('method')}: expected grid; others need wandb's server")
        if sweep["metric"].get("goal") not in BETTER:
            raise InputError(f"{file} has the metric goal {sweep['metric'].get('goal')}: expected minimize or maximize")
        for name, choice in sweep["parameters"].items():
            if not {"value", "values"} & set(choice):
                raise InputError(f"{file}: parameter {name} has no values, which a grid needs")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): expected one as in configs/sweeps") from error
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no sweep: expected a YAML file such as in configs/sweeps") from error
    return sweep


def combinations(parameters: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every choice of one value for each parameter."""
    values = [choice.get("values", [choice.get("value")]) for choice in parameters.values()]
    return [dict(zip(parameters, chosen, strict=True)) for chosen in itertools.product(*values)]


def run_name(chosen: dict[str, Any], varied: Sequence[str]) -> str:
    """Such as ``learning_rate=0.001,schedule=cosine``."""
    return ",".join(f"{name.rpartition('.')[2]}={chosen[name]}" for name in varied).replace("/", "-") or "only"


def command_of(sweep: dict[str, Any], chosen: dict[str, Any], run: Path, more: Sequence[str]) -> list[str]:
    """The command of one run; wandb's macros become what wandb makes of them."""
    args = [f"--{name}={value}" for name, value in chosen.items()]
    macros = {"${env}": [], "${interpreter}": [sys.executable], "${args}": [*args, f"--run_dir={run}", *more]}
    return [word for part in sweep["command"] for word in macros.get(part, [str(part)])]


def finished(run: Path) -> bool:
    calls = read_record(run).get("calls", [])
    return bool(calls) and "to_step" in calls[-1]


def run_sweep(file: Path, more: Sequence[str] = ()) -> list[tuple[Path, float | None]]:
    """Run what is not finished yet, and print the table.

    Returns:
        Each run's folder and its best value of the metric, None where it has none.

    Raises:
        InputError: The file is no grid, or a run fails.
    """
    sweep = read_sweep(file)
    metric, better = sweep["metric"]["name"], BETTER[sweep["metric"]["goal"]]
    chosen_all = combinations(sweep["parameters"])
    varied = [name for name in sweep["parameters"] if len({str(chosen[name]) for chosen in chosen_all}) > 1]
    results = []
    for number, chosen in enumerate(chosen_all, 1):
        run = ROOT / sweep.get("name", file.stem) / run_name(chosen, varied)
        done = finished(run)
        console.print(f"[bold]run {number} of {len(chosen_all)}[/bold]: {run.name}{' (done before)' if done else ''}")
        if not done:
            command = command_of(sweep, chosen, run, more)
            resumed = ["--ckpt_path=last"] if run.exists() else []
            if code := subprocess.run([*command, *resumed]).returncode:
                raise InputError(f"run {run.name} ended with exit code {code}: mend it and call the sweep again")
        values = [row[metric] for row in read_metrics(run) if metric in row]
        results.append((run, better(values) if values else None))
    known = [value for _, value in results if value is not None]
    table = Table(*(name for name in varied), f"best {metric}", title=f"Sweep {file.stem}", title_justify="left")
    for chosen, (_, value) in zip(chosen_all, results, strict=True):
        shown = "" if value is None else f"{value:.4f}"
        style = "bold green" if known and value == better(known) else None
        table.add_row(*(str(chosen[name]) for name in varied), shown, style=style)
    console.print(table)
    folders = " ".join(f"'{run}'" for run, _ in results)
    console.print(f"next: python -m experiment.report {folders}", markup=False)
    return results


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m experiment.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="a sweep's file, such as configs/sweeps/lm_learning_rate.yaml")
    options, more = parser.parse_known_args(args)  # whatever else is given goes to each run
    try:
        run_sweep(options.file, more)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
