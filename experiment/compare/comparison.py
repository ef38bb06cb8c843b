"""Configurations side by side: a run of `fit` for each row of a comparison's file and each seed, and tables of them.

    tinylab compare FILE [--only ROW ...] [--seeds 1 2 3] [--budget seconds=1200] [flags of fit]

What is done is not run again, nor what another comparison has run already; a run that was cut short goes on from its
last checkpoint, and one that failed is tried again. The same command in several processes shares the runs among them.
Every run that ends well leaves a line in results.jsonl of --out; the lines of other machines count once their file lies
there as results-NAME.jsonl.
docs/configuration.md explains every name in a comparison's file.
"""

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, dict_to_namespace, get_loader

from experiment.command_parser import CommandParser
from experiment.errors import InputError
from experiment.renamed import current_file
from experiment.wording import as_called

Values = Mapping[str, Any]
OWN_FLAGS = {"run_dir", "ckpt_path", "seed_everything"}  # each run has its own
BUDGET_FLAGS = {"checkpoint.every_n_steps", "trainer.max_steps", "trainer.max_epochs", "trainer.max_time"}
BUDGET_FLAGS |= {"trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.log_every_n_steps"}
BUDGETS = ("steps", "tokens", "seconds", "epochs", "tokens_per_parameter")


@dataclass(frozen=True)
class Row:
    """Configurations over each other and flags over these; `shows` says in a sentence what for."""

    name: str
    package: str
    configs: Sequence[str] = ()
    flags: Values = field(default_factory=dict)
    budget: Values = field(default_factory=dict)
    title: str = ""
    shows: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        numbers = all(isinstance(value, int | float) and value > 0 for value in self.budget.values())
        if len(self.budget.keys() - {"points"}) > 1 or not {*self.budget} <= {"points", *BUDGETS} or not numbers:
            raise InputError(f"row {self.name}: budget {self.budget}: expected one above 0 of {', '.join(BUDGETS)}")

    @property
    def unit(self) -> str | None:
        """What the budget is of; None where it is the configurations'."""
        return next((name for name in self.budget if name != "points"), None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """All configurations and flags as one."""
        return merged(self.configs, self.flags)


@dataclass(frozen=True)
class Comparison:
    """What a file asks for; `quoted` has figures of others by their title."""

    name: str
    rows: Sequence[Row]
    metric: Mapping[str, str]
    report: Sequence[str]
    seeds: Sequence[int] = (1,)
    at: str = "last"
    baseline: str | None = None
    plot: str = "rows"
    quoted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {"at": ("last", "best"), "plot": ("rows", "compute"), "goal": ("minimize", "maximize")}
        for name, value in (("at", self.at), ("plot", self.plot), ("goal", self.metric["goal"])):
            if value not in known[name]:
                raise InputError(f"{name} {value}: expected {' or '.join(known[name])}")


@dataclass(frozen=True)
class Run:
    """A row with a seed."""

    row: Row
    seed: int

    @cached_property
    def key(self) -> str:
        """Equal for the runs of all comparisons that are equal in configuration, budget and seed."""
        row = self.row
        content = json.dumps([row.package, row.config, row.budget, self.seed], sort_keys=True, default=str)
        stem = Path(row.configs[0] if row.configs else row.package).stem
        return f"{stem}-seed{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    @property
    def arguments(self) -> list[str]:
        """What follows `fit` on its command line, but for the budget's flags."""
        given = [("config", config) for config in self.row.configs] + [*self.row.flags.items()]
        words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given]
        return [*words, f"--seed_everything={self.seed}"]


def as_value(word: Any) -> Any:
    """The value that a word of the command line stands for, as `fit` reads it; 1.0 is 1."""
    with suppress(yaml.YAMLError):
        word = get_loader("yaml")(word) if isinstance(word, str) else word
    return int(word) if isinstance(word, float) and word.is_integer() else word


def merged(configs: Sequence[str], flags: Values) -> dict[str, Any]:
    """Configuration files over each other, and flags, named with dots, over these."""
    whole = Namespace()
    for values in (*(dict_to_namespace(read_yaml(config)) for config in configs), flags):
        for name, value in values.items():  # of a namespace, with dots
            whole[name] = as_value(value)
    return whole.as_dict()


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The content of a YAML file; an InputError where there is none, or no names with values in it."""
    try:
        return {**yaml.safe_load(Path(current_file(str(file))).read_text(encoding="utf-8"))}
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}): expected names with values, as in configs/") from error


def read_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Configurations and flags among the words that follow a `fit`; an InputError for a word that is neither."""
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            flags.append(word[2:].split("=", 1))
        elif flags and len(flags[-1]) == 1:
            flags[-1].append(word)
        else:
            raise InputError(f"{word}: expected a flag of fit, such as --data.batch_size=8")
    named = [(name, *value, "true")[:2] for name, *value in flags]
    return [value for name, value in named if name == "config"], {n: v for n, v in named if n != "config"}


def read_comparison(args: Sequence[str] | None) -> tuple[Comparison, Path]:
    """What a command line asks for, and the folder of all comparisons; an InputError names what cannot be run."""
    parser = CommandParser("tinylab compare", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = as_called(__doc__ or "")
    parser.add_argument("file", type=Path, help="such as configs/comparisons/recipes.yaml; or one of `wandb sweep`")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to make, by default all")
    parser.add_argument("--rows", nargs="+", metavar="CONFIG", help="instead of the file's: A.yaml B.yaml,OVER_B.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run each, by default the file's")
    parser.add_argument("--budget", nargs="+", metavar="UNIT=N", help="instead of the file's: seconds=1200 points=8")
    parser.add_argument("--out", type=Path, default=Path("runs/comparisons"), help="by default %(default)s")
    options, words = parser.parse_known_args(args)
    file, found = options.file, {}
    content = {"name": file.stem} | read_yaml(file)
    try:
        (added, typed), budget = read_words(words), dict(word.split("=", 1) for word in options.budget or ())
        content = from_sweep(content) if "command" in content else content
        shared = {name: content.pop(name, {}) for name in ("package", "budget")}
        drawn = expand(*(content.pop(name, None) for name in ("parameters", "method", "run_cap")))
        configs, common, rows = content.pop("configs", []), content.pop("flags", {}), content.pop("rows", {"": {}})
        if options.rows:
            sets = [row.split(",") for row in options.rows]
            rows = {"+".join(Path(config).stem for config in row): {"configs": row} for row in sets}
            if len(rows) < len(sets):
                raise InputError(f"--rows {' '.join(options.rows)}: two would have one name: rename a configuration")
            content["baseline"] = None
        for name, (chosen, values) in itertools.product(rows, drawn):
            row = shared | (rows[name] or {})
            if budget:
                row["budget"] = {"points": row["budget"].get("points", 8), **budget}
            row["budget"] = {unit: as_value(value) for unit, value in row["budget"].items()}
            for flag in typed.keys() & (OWN_FLAGS | BUDGET_FLAGS if row["budget"] else OWN_FLAGS):
                raise InputError(f"--{flag} is set for each run: use the comparison's own options, --help")
            row["flags"] = {**common, **typed, **row.get("flags", {}), **values}
            row["configs"] = [*configs, *row.get("configs", []), *added]
            label = ",".join(filter(None, (name, chosen))) or "only"
            found[label] = Row(label, **{"title": label, **row})
        base, names = content.get("baseline"), options.only or [*found]
        for option, name in [("baseline", base), *(("--only", name) for name in names)]:
            if name is not None and name not in found:
                raise InputError(f"{option} {name}: there is no such row; expected some of {', '.join(found)}")
        content |= {"baseline": base if base in names else None, "seeds": options.seeds or content.get("seeds", [1])}
        return Comparison(**content | {"rows": [found[name] for name in names]}), options.out
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        why = str(error).rpartition("__init__() ")[2]
        raise InputError(f"{file} is no comparison ({why}): expected a file as in configs/comparisons") from error


def from_sweep(content: Values) -> dict[str, Any]:
    """A file of `wandb sweep` in our terms; the best validation counts."""
    words = [str(word) for word in content["command"]]
    if not {"-m", "fit", "${args}"} <= set(words):
        raise InputError(f"command {' '.join(words)}: expected -m, a package, fit and ${{args}} in it")
    configs, flags = read_words([word for word in words[words.index("fit") + 1 :] if word != "${args}"])
    ours = {name: content[name] for name in ("name", "parameters", "method", "run_cap", "metric") if name in content}
    ours |= {"package": words[words.index("-m") + 1], "configs": configs, "flags": flags}
    return ours | {"at": "best", "report": [content["metric"]["name"]]}


def expand(parameters: Values | None, method: str | None, run_cap: int | None) -> list[tuple[str, Values]]:
    """Every combination, or draw, of `wandb sweep`'s parameters: a name and flags; of no parameters the empty one."""
    if method not in (None, "grid", "random"):
        raise InputError(f"method {method}: expected grid or random; others need wandb's server")
    parameters, dice = parameters or {}, random.Random(0) if method == "random" else None  # the same draws every time
    rounds = [[choices(*one, dice) for one in parameters.items()] for _ in range((run_cap or 10) if dice else 1)]
    drawn = [dict(zip(parameters, values, strict=True)) for one in rounds for values in itertools.product(*one)]
    varied = [name for name in parameters if "value" not in parameters[name]]
    shown = [[f"{name.rpartition('.')[2]}={json.dumps(flags[name])}" for name in varied] for flags in drawn]
    return [(",".join(words).replace('"', ""), flags) for words, flags in zip(shown, drawn, strict=True)]


def choices(name: str, choice: Values, dice: random.Random | None) -> Sequence[Any]:
    """All values of a parameter; with dice one of them, by wandb's distributions."""
    match {"distribution": None, **choice}:
        case {"value": value}:
            return [value]
        case {"values": values}:
            return values if dice is None else [dice.choice(values)]
        case {"min": int(low), "max": int(high), "distribution": None | "int_uniform"} if dice:
            return [dice.randint(low, high)]
        case {"min": low, "max": high, "distribution": None | "uniform"} if dice:
            return [float(f"{dice.uniform(low, high):.4g}")]
        case {"min": low, "max": high, "distribution": "log_uniform_values"} if dice:
            return [float(f"{low * (high / low) ** dice.random():.4g}")]
    raise InputError(f"parameter {name} {dict(choice)}: expected value, values, or of method random min and max")
