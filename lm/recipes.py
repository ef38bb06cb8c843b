"""Recipes side by side: configurations at equal tokens or at equal training time, with several seeds.

    python -m lm.recipes [CONFIG ...] (--tokens 4e6 | --seconds 1200) [--seeds 1 2 3] [flags of lm fit]

Each configuration is a recipe, by default report.yaml, llama2c.yaml and fast.yaml of configs/lm. It is trained by
`python -m lm fit` for as many steps as the budget allows, so that its schedule ends with the budget, and validated
along the way and at the end, all on the same text. Time is that of training, without validation; how long a step of
each recipe takes is measured once. What is done is not run again; the table is printed, and written as Markdown, CSV
and a plot. `report.yaml,mine.yaml` is the recipe report+mine: report.yaml with mine.yaml laid over it.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from experiment.comparison import (
    RESERVED,
    Line,
    Parser,
    Run,
    cells,
    command_line,
    fit,
    fit_flags,
    make_runs,
    read_config,
    write_table,
)
from experiment.console import console
from experiment.curves import COLORS
from experiment.errors import InputError
from experiment.summary import read_metrics

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lm.data import TinyStories

RECIPES = [f"configs/lm/{name}.yaml" for name in ("report", "llama2c", "fast")]
COLUMNS = {  # name of a figure: title of its column, format
    "val_loss": ("validation loss", ".4f"),
    "val_perplexity": ("perplexity", ".2f"),
    "val_bits_per_byte": ("bits per byte", ".4f"),
    "tokens": ("tokens", ",.0f"),
    "training_seconds": ("training seconds", ",.0f"),
}
DEFAULTS = ["--data.evaluation=full", "--samples.every_n_steps=0", "--report=false"]
# Every step is logged, so that tokens and seconds add up to what they were.
COUNTED = ["--trainer.max_epochs=-1", "--trainer.check_val_every_n_epoch=null", "--trainer.log_every_n_steps=1"]
SET = [*RESERVED, *(flag.partition("=")[0] for flag in COUNTED), "--checkpoint.every_n_steps", "--trainer.max_steps"]
SET += ["--trainer.max_time", "--trainer.val_check_interval"]  # the budget's, in place of fit's own
STEPS_TIMED, STEPS_SKIPPED = 20, 5  # the first steps are slower than those that follow


@dataclass(frozen=True)
class Recipe:
    """A configuration, its flags included, and what fit would make of it: its data, set up, and its trainer."""

    name: str
    arguments: list[str]
    data: "TinyStories"
    trainer: "Trainer"

    @property
    def tokens_a_step(self) -> float:
        """Targets that an optimizer step trains on all devices, pads excluded: the mean over an epoch.

        Raises:
            InputError: The data is streamed, so that nobody has counted it.
        """
        if self.data.streaming:
            raise InputError(f"--tokens: what {self.name} streams is not counted beforehand; give --seconds")
        batches = len(self.data.train_schedule.plan(0)) // self.trainer.world_size
        targets = self.data.train_dataloader().dataset.windows.length - 1
        return float(targets.sum()) / math.ceil(batches / self.trainer.accumulate_grad_batches)


def prepare(configs: str, flags: Sequence[str]) -> Recipe:
    """The recipe of a configuration, or of several with commas between, which lie over one another; checked.

    Raises:
        InputError: What fit itself would refuse; some of it ends the process as fit does.
    """
    files = [Path(config) for config in configs.split(",")]
    for file in files:
        read_config(file)
    from experiment.checks import check_training  # these bring Lightning, which --help need not wait for
    from experiment.cli import run
    from lm.cli import LanguageCLI

    class Prepared(LanguageCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Everything is made, nothing begins."""

    arguments = [*(f"--config={file}" for file in files), *DEFAULTS, *flags, *COUNTED]
    cli = run(Prepared, ["fit", *arguments])
    cli.datamodule.setup("fit")
    check_training(cli.trainer, cli.datamodule)
    return Recipe("+".join(file.stem for file in files), arguments, cli.datamodule, cli.trainer)


def check_comparable(recipes: Sequence[Recipe]) -> None:
    """See that each recipe has a name of its own, and that all are evaluated on the same text.

    Raises:
        InputError: They do not.
    """
    first = recipes[0]
    for number, other in enumerate(recipes):
        pair = f"{first.name} and {other.name}"
        if other.name in {earlier.name for earlier in recipes[:number]}:
            raise InputError(f"two configurations are called {other.name}, which names a row: rename one")
        if other.data.path != first.data.path:
            raise InputError(f"{pair} read {first.data.path} and {other.data.path}: give one --data.path for all")
        read = {(data.sequence_length, data.tokenizer.fingerprint) for data in (first.data, other.data)}
        if first.data.evaluation == "report" and len(read) > 1:
            raise InputError(
                f"{pair} differ in data.tokenizer or data.sequence_length, so that --data.evaluation report reads more "
                "of a story with one of them: take full, or give both flags for all"
            )


def read_curve(run_dir: Path) -> dict[str, list[float]]:
    """Tokens trained and seconds of training until each validation of a run, and the figures that it had there."""
    tokens = seconds = 0.0
    curve: dict[str, list[float]] = {}
    for row in read_metrics(run_dir):
        if "train/tokens" in row:
            seconds += (row["train/tokens"] - tokens) / row["train/tokens_per_second"]
            tokens = row["train/tokens"]
        if "val/loss" in row:
            figures = {name.replace("/", "_"): value for name, value in row.items() if name.startswith("val/")}
            for name, value in {"tokens": tokens, "training_seconds": seconds, **figures}.items():
                curve.setdefault(name, []).append(value)
    return curve


def time_steps(run: Run, run_dir: Path) -> Line:
    """How long a step takes, once the first are over: the median, in seconds."""
    used = fit("lm", run.arguments, run_dir)
    rows = [row for row in read_metrics(run_dir) if "train/tokens" in row]
    tokens = [after["train/tokens"] - before["train/tokens"] for before, after in itertools.pairwise(rows)]
    steps = [n / row["train/tokens_per_second"] for n, row in zip(tokens, rows[1:], strict=True)]
    return {"seconds_a_step": median(steps[STEPS_SKIPPED:]), **used}


def train(run: Run, run_dir: Path) -> Line:
    used = fit("lm", run.arguments, run_dir)
    curve = read_curve(run_dir)
    if not curve:
        raise InputError(f"the run {run_dir} was never validated: leave out --trainer.limit_val_batches 0")
    return {name: values[-1] for name, values in curve.items()} | used | {"curve": curve}


def rows_of(results: Mapping[str, Sequence[Line]]) -> tuple[list[str], list[list[str]]]:
    seeds = {name: ", ".join(str(line["seed"]) for line in lines) for name, lines in results.items()}
    rows = [[name, *cells(lines, COLUMNS), seeds[name]] for name, lines in results.items()]
    return ["recipe", *(title for title, _ in COLUMNS.values()), "seeds"], rows


def draw(results: Mapping[str, Sequence[Line]], file: Path) -> None:
    """Bits per byte against tokens and against seconds: each seed as a thin line, their mean with dots."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for (name, lines), color in zip(results.items(), itertools.cycle(COLORS), strict=False):
        curves = [line["curve"] for line in lines]
        for axes, along in zip(panels, ("tokens", "training_seconds"), strict=True):
            for curve in curves:
                axes.plot(curve[along], curve["val_bits_per_byte"], color=color, linewidth=0.8, alpha=0.5)
            middle = [  # as far as all seeds came
                [fmean(values) for values in zip(*(curve[name_of] for curve in curves), strict=False)]
                for name_of in (along, "val_bits_per_byte")
            ]
            axes.plot(*middle, "o-", color=color, linewidth=1.8, markersize=4, label=name)
            axes.set_xlabel(along.replace("_", " "))
    for axes in panels:
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].xaxis.set_major_formatter(EngFormatter())
    panels[0].set_ylabel("validation bits per byte")
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=200)


def costs(recipes: Sequence[Recipe], unit: str, seed: int, out: Path) -> list[float]:
    """What a step of each recipe takes of the budget: tokens, or seconds, which are measured first."""
    if unit == "tokens":
        return [recipe.tokens_a_step for recipe in recipes]
    short = [f"--trainer.max_steps={STEPS_TIMED}", "--trainer.limit_val_batches=0", f"--seed_everything={seed}"]
    runs = [Run(f"time of {one.name}", f"{one.name}-time", seed, [*one.arguments, *short]) for one in recipes]
    return [line["seconds_a_step"] for (line,) in make_runs(runs, out, time_steps).values()]


def run_of(recipe: Recipe, steps: int, points: int, seed: int) -> Run:
    """So many steps of a recipe, validated and saved at so many points."""
    interval = math.ceil(steps / points)
    batches = interval * recipe.trainer.accumulate_grad_batches  # which is what Lightning counts between validations
    flags = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={batches}"]
    flags += [f"--checkpoint.every_n_steps={interval}", f"--seed_everything={seed}"]
    return Run(recipe.name, recipe.name, seed, [*recipe.arguments, *flags])


def compare(args: Sequence[str]) -> None:
    usage = "python -m lm.recipes [CONFIG ...] (--tokens N | --seconds N) [OPTIONS] [flags of lm fit]"
    parser = Parser("python -m lm.recipes", __doc__, usage)
    budgets = parser.add_mutually_exclusive_group(required=True)
    budgets.add_argument("--tokens", type=float, help="targets that each run trains, pads excluded")
    budgets.add_argument("--seconds", type=float, help="time that each run trains, validation excluded")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one run each, by default 1 2 3")
    parser.add_argument("--points", type=int, default=8, help="validations of a run, the last at its end; by default 8")
    parser.add_argument("--out", type=Path, help="folder of everything, by default runs/recipes/<budget>")
    configs = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    options, others = parser.parse_known_args(args[len(configs) :])
    if options.points < 1:
        raise InputError(f"--points {options.points}: expected 1 or more")
    unit, budget = ("seconds", options.seconds) if options.tokens is None else ("tokens", options.tokens)
    out = options.out or Path("runs/recipes") / f"{budget:.10g}-{unit}"

    flags = fit_flags(others, SET)
    recipes = [prepare(config, flags) for config in configs or RECIPES]
    check_comparable(recipes)
    steps = [budget / cost for cost in costs(recipes, unit, options.seeds[0], out)]
    for recipe, number in zip(recipes, steps, strict=True):
        if not 1 <= number < math.inf:
            raise InputError(f"--{unit} {budget:g} makes {number:.2g} steps of {recipe.name}: expected at least one")
    results = make_runs(
        [
            run_of(recipe, round(number), options.points, seed)
            for seed in options.seeds
            for recipe, number in zip(recipes, steps, strict=True)
        ],
        out,
        train,
    )

    data = recipes[0].data
    notes = [
        f"{budget:,.10g} {unit} each, mean ± standard deviation over the seeds.",
        f"Evaluated on {data.path}, evaluation {data.evaluation}.",
    ]
    if len({recipe.data.tokenizer.fingerprint for recipe in recipes}) > 1:
        notes.append(
            "The tokenizers differ: bits per byte is the fair measure, not the loss or perplexity of a token, and "
            "equal tokens are not equal text."
        )
    header, rows = rows_of(results)
    write_table(out / "recipes", "Recipes", header, rows, notes)
    draw(results, out / "recipes.png")
    console.print(f"tables, plot and every run lie in {out}")


def main(args: Sequence[str] | None = None) -> None:
    """Run a comparison; flags that are not its own go to every `lm fit`."""
    with command_line():
        compare(sys.argv[1:] if args is None else list(args))


if __name__ == "__main__":
    main()
