"""Compare configurations: one run of `fit` for each row of a comparison file and each seed, and tables of the results.

    tinylab compare FILE [--only ROW ...] [--seeds 1 2 3] [--budget seconds=1200] [flags of fit]

A finished run is not repeated, an interrupted one is resumed, and several processes share the runs. To use the runs of
another machine, copy its results.jsonl to results-NAME.jsonl next to yours. docs/configuration.md explains the file.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from experiment.command_parser import CommandParser
from experiment.errors import InputError
from experiment.renamed import current_file
from experiment.sources.configurations import read_configuration
from experiment.sources.fit_arguments import as_value, merged, read_words
from experiment.sources.keys import MAPPINGS, NUMBER, NUMBERS, TEXTS, check_keys
from experiment.wording import MEANINGS, hint, listed

Values = Mapping[str, Any]
Line = dict[str, Any]  # the record of a run: its key, configuration, machine and metrics
OWN_FLAGS = {"run_dir", "ckpt_path", "seed_everything"}  # set separately for each run
BUDGET_FLAGS = {"checkpoint.every_n_steps", "trainer.max_steps", "trainer.max_epochs", "trainer.max_time"}
BUDGET_FLAGS |= {"trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.log_every_n_steps"}
BUDGETS = ("steps", "tokens", "seconds", "epochs", "tokens_per_parameter")
SHARED = {"package": str, "configs": TEXTS, "flags": dict, "budget": dict}
OF_ROW = SHARED | {"title": str, "shows": str, "group": str}
OF_FILE = SHARED | {"name": str, "metric": dict, "report": TEXTS, "seeds": NUMBERS, "baseline": str, "quoted": MAPPINGS}
OF_FILE |= {"at": ("last", "best"), "plot": ("rows", "compute"), "rows": dict}
OF_FILE |= {"parameters": dict, "method": ("grid", "random"), "run_cap": int}  # as in `wandb sweep`
OF_RUNS = ("train/loss", "parameters", "trainable", "tokens", "seconds", "training_seconds", "memory_mib", "compute")
METRICS = {"lm": ("loss", "perplexity", "bits_per_byte"), "classify": ("loss", "accuracy", "f1")}


@dataclass(frozen=True)
class Run:
    """A row with one seed: stacked configurations, and flags on top; `shows` says what it shows."""

    name: str
    seed: int
    package: str
    configs: Sequence[str] = ()
    flags: Values = field(default_factory=dict)
    budget: Values = field(default_factory=dict)
    title: str = ""
    shows: str = ""
    group: str = ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """All configurations and flags, merged."""
        return merged(self.configs, self.flags)

    @cached_property
    def key(self) -> str:
        """Identifies a run across comparisons by its configuration, budget and seed."""
        content = json.dumps([self.package, self.config, self.budget, self.seed], sort_keys=True, default=str)
        stem = Path(self.configs[0] if self.configs else str(self.package)).stem  # None if no file names one
        return f"{stem}-seed{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of `fit`, except the budget's flags."""
        given = [("config", config) for config in self.configs] + [*self.flags.items()]
        words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given]
        return [*words, f"--seed_everything={self.seed}"]


@dataclass(frozen=True)
class Comparison:
    """A comparison file: rows, each run with every seed; `quoted` has published results by title."""

    name: str
    rows: Sequence[Run]
    metric: Mapping[str, str]
    report: Sequence[str]
    seeds: Sequence[int] = (1,)
    at: str = "last"
    baseline: str | None = None
    plot: str = "rows"
    quoted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def read_comparison(args: Sequence[str] | None) -> tuple[Comparison, Path]:
    """The comparison of a command line, and the folder of all comparisons; an InputError names what cannot be run."""
    parser = CommandParser("tinylab compare", __doc__, whole=True)
    parser.add_argument("file", type=Path, help="such as configs/comparisons/recipes.yaml, or a `wandb sweep` file")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to run; default: all")
    parser.add_argument("--rows", nargs="+", metavar="CONFIG", help="instead of the file's: A.yaml B.yaml,OVER_B.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run per seed; default: the file's")
    parser.add_argument("--budget", nargs="+", metavar="UNIT=N", help="instead of the file's: seconds=1200 points=8")
    parser.add_argument("--out", type=Path, default=Path("runs/comparisons"), help="output; default: %(default)s")
    options, words = parser.parse_known_args(args)
    file, found = options.file, {}
    content = {"name": file.stem, "seeds": [1]} | read_configuration(current_file(str(file)))
    try:
        if content.keys() & {"trainer", "model", "data"}:
            raise InputError("this is a configuration of fit: name it under `configs` of a comparison")
        content = from_sweep(content) if "command" in content else content
        content = check_keys(content, OF_FILE, required=("metric", "seeds"))
        check_keys(content["metric"], {"name": str, "goal": ("minimize", "maximize")}, "metric: ", required=("name",))
        content["report"] = [*dict.fromkeys((*content.get("report", ()), content["metric"]["name"]))]
        (added, typed), given = read_words(words), dict(word.partition("=")[::2] for word in options.budget or ())
        shared = {name: content.pop(name, None) or kind() for name, kind in SHARED.items()}
        drawn = expand(content.pop("parameters", {}), content.pop("method", "grid"), content.pop("run_cap", 10))
        rows = [*content.pop("rows", {"": {}}).items()]
        if options.rows:
            sets, content["baseline"] = [row.split(",") for row in options.rows], None
            stems = ["+".join(Path(config).stem for config in row) for row in sets]
            names = stems if len(set(stems)) == len(stems) else options.rows
            rows = [(name, {"configs": row}) for name, row in zip(names, sets, strict=True)]
        for (name, own), (chosen, values) in itertools.product(rows, drawn.items()):
            label = ",".join(filter(None, (name, chosen))) or "only"
            own = check_keys(own or {}, OF_ROW, f"row {label}: ")
            row = {"title": label, **shared, **own}
            row["configs"] = [*shared["configs"], *own.get("configs", []), *added]
            row["flags"] = {**shared["flags"], **typed, **own.get("flags", {}), **values}
            asked = {"points": row["budget"].get("points", 8), **given} if given else row["budget"]
            number = {unit: as_value(value) if value else value for unit, value in asked.items()}
            row["budget"] = check_keys(number, dict.fromkeys((*BUDGETS, "points"), NUMBER), f"row {label}: budget: ")
            if row["budget"] and (len(row["budget"].keys() - {"points"}) != 1 or min(row["budget"].values()) <= 0):
                raise InputError(f"row {label}: budget {row['budget']}: expected one of {listed(BUDGETS)}, above 0")
            limits = (typed if given else row["flags"]) if row["budget"] else ()  # --budget overrides the file's own
            for flag in row["flags"].keys() & (OWN_FLAGS | BUDGET_FLAGS.intersection(limits)):
                raise InputError(f"--{flag} is set for each run: use the comparison's own options; see --help")
            check_keys(row, OF_ROW, f"row {label}: ", required=("package",))
            found[label] = Run(label, content["seeds"][0], **row)
        base, names = content.get("baseline"), options.only or [*found]
        for option, name in [("baseline", base), *(("--only", name) for name in names)]:
            if name not in (None, *found):
                raise InputError(f"{option} {name}: there is no such row{hint(name, found)}; expected {listed(found)}")
        packages = {row.package.partition(".")[0] for row in found.values()}
        names_of = dict.fromkeys(name for package in packages for name in METRICS.get(package, MEANINGS))
        known = [*OF_RUNS, *(f"{kind}{name}" for kind in ("val/", "test/", "val/second_") for name in names_of)]
        for name in (name for name in content["report"] if name not in known):  # a callback could log it
            if "/" not in name or (packages <= METRICS.keys() and (hint(name, known) or Path(name).name in MEANINGS)):
                raise InputError(f"{name}: there is no such metric{hint(name, known)}; expected {listed(known)}")
        content |= {"baseline": base if base in names else None, "seeds": options.seeds or content["seeds"]}
        return Comparison(**content | {"rows": [found[name] for name in names]}), options.out
    except InputError as error:
        raise InputError(f"comparison {file}: {error}; docs/configuration.md explains the file") from error


def from_sweep(content: Values) -> dict[str, Any]:
    """Convert a `wandb sweep` file to a comparison; the best validation counts."""
    words = [*map(str, given)] if isinstance(given := content["command"], list) else [str(given)]
    if not {"-m", "fit", "${args}"} <= set(words):
        raise InputError(f"command {' '.join(words)}: expected -m, a package, fit and ${{args}} in it")
    configs, flags = read_words([word for word in words[words.index("fit") + 1 :] if word != "${args}"])
    ours = {"package": words[words.index("-m") + 1], "configs": configs, "flags": flags, "at": "best"}
    return ours | {name: value for name, value in content.items() if name in OF_FILE}


def expand(parameters: Values, method: str, run_cap: int) -> dict[str, Values]:
    """Every combination or draw of `wandb sweep` parameters, as flags by name; one empty set without parameters."""
    dice = random.Random(0) if method == "random" else None  # the same draws every time
    rounds = [[choices(*one, dice) for one in parameters.items()] for _ in range(run_cap if dice else 1)]
    drawn = [dict(zip(parameters, values, strict=True)) for one in rounds for values in itertools.product(*one)]
    varied = {name: name.rpartition(".")[2] for name in parameters if "value" not in parameters[name]}
    names = [",".join(f"{short}={json.dumps(flags[name])}" for name, short in varied.items()) for flags in drawn]
    return {name.replace('"', ""): flags for name, flags in zip(names, drawn, strict=True)}


def choices(name: str, choice: Values, dice: random.Random | None) -> Sequence[Any]:
    """All values of a parameter; with `dice` a random one, using wandb's distributions."""
    match {"distribution": None} | choice if isinstance(choice, dict) else None:
        case {"value": value}:
            return [value]
        case {"values": [_, *_] as values}:
            return values if dice is None else [dice.choice(values)]
        case {"min": int(low), "max": int(high), "distribution": None | "int_uniform"} if dice and low <= high:
            return [dice.randint(low, high)]
        case {"min": Real() as low, "max": Real() as high, "distribution": None | "uniform"} if dice and low <= high:
            return [float(f"{dice.uniform(low, high):.4g}")]
        case {"min": Real() as low, "max": Real() as high, "distribution": "log_uniform_values"} if dice and low > 0:
            return [float(f"{low * (high / low) ** dice.random():.4g}")]
    raise InputError(f"parameter {name} {choice}: expected value, a list of values, or with method random min and max")
