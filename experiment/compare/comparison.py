"""A comparison's file: rows of configurations and flags, with grids and draws over them, seeds, and a budget.

    package: lm                          # whose `fit` every row is
    configs: [configs/lm/fast.yaml]      # under every row's own
    flags: {data.evaluation: full}       # of every row; the command line's win over these, a row's own over both
    budget: {tokens: 2.0e+6, points: 4}  # or steps, seconds, epochs, tokens_per_parameter; else the configurations'
    seeds: [1, 2, 3]
    metric: {name: val/bits_per_byte, goal: minimize}  # what rows are judged by
    at: last                             # which validation is reported: the last, or the best, that of least val/loss
    report: [val/loss, val/bits_per_byte, tokens]
    baseline: fast                       # the row that the others are compared with
    plot: rows                           # or curves, or compute
    rows:
      fast: {}
      no_positions: {group: positions, shows: "What positions give.", flags: {model.variant.positions: none}}

`parameters`, `method` (grid or random) and `run_cap` are those of `wandb sweep`: each combination or draw is a row, or
one of every row. A file with `command` in place of package, configs and rows serves `wandb sweep` as it is.
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import yaml

from experiment.errors import InputError
from experiment.renamed import current_file

Values = Mapping[str, Any]
OWN_FLAGS = ("run_dir", "ckpt_path", "seed_everything")  # each run has its own
BUDGET_FLAGS = ("checkpoint.every_n_steps", "trainer.max_steps", "trainer.max_epochs", "trainer.max_time")
BUDGET_FLAGS += ("trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.log_every_n_steps")
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
        object.__setattr__(self, "budget", {name: as_value(value) for name, value in self.budget.items()})
        numbers = all(isinstance(value, int | float) and value > 0 for value in self.budget.values())
        if len(self.unit) > 1 or not {*self.unit} <= {*BUDGETS} or not numbers:
            raise InputError(f"row {self.name}: budget {self.budget}: expected one above 0 of {', '.join(BUDGETS)}")

    @property
    def unit(self) -> list[str]:
        """What the budget is of; empty where it is the configurations'."""
        return [name for name in self.budget if name != "points"]


@dataclass(frozen=True)
class Comparison:
    """What a file asks for; `quoted` has figures of others by their title."""

    name: str
    rows: Sequence[Row]
    metric: Mapping[str, str]
    report: Sequence[str]
    flags: Values = field(default_factory=dict)
    seeds: Sequence[int] = (1,)
    at: str = "last"
    baseline: str | None = None
    plot: str = "rows"
    quoted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = {
            "metric.goal": (self.metric["goal"], ("minimize", "maximize")), "at": (self.at, ("last", "best")),
            "plot": (self.plot, ("rows", "curves", "compute")),
            "baseline": (self.baseline, (None, *(row.name for row in self.rows))),
        }  # fmt: skip
        for name, (value, known) in allowed.items():
            if value not in known:
                raise InputError(f"{name} {value}: expected one of {', '.join(map(str, known))}")


@dataclass(frozen=True)
class Run:
    """A row with a seed, and what the command line adds to all rows."""

    row: Row
    seed: int
    configs: Sequence[str]
    flags: Values
    group: str  # the comparison's name, and W&B's group of its runs

    @cached_property
    def config(self) -> dict[str, Any]:
        """All configurations and flags as one."""
        return merged(self.configs, self.flags)

    @cached_property
    def key(self) -> str:
        """Equal for the runs of all comparisons that are equal in configuration, budget and seed."""
        content = json.dumps([self.row.package, self.config, self.row.budget, self.seed], sort_keys=True, default=str)
        stem = Path(self.configs[0] if self.configs else self.row.package).stem
        return f"{stem}-seed{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    @property
    def arguments(self) -> list[str]:
        """What follows `fit` on its command line, but for the budget's flags."""
        flags = [f"--{name}={as_word(value)}" for name, value in self.flags.items()]
        return [*(f"--config={config}" for config in self.configs), *flags, f"--seed_everything={self.seed}"]


def as_word(value: Any) -> str:
    """A value as a flag has it: null, true and lists as JSON, which is YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def as_value(word: Any) -> Any:
    """The value that a word of the command line stands for; 1e-3, a text to YAML 1.1, is a number, and 1.0 is 1."""
    try:
        value = yaml.safe_load(word) if isinstance(word, str) else word
        value = float(value) if isinstance(value, str) else value
    except (ValueError, yaml.YAMLError):
        return word
    return int(value) if isinstance(value, float) and value.is_integer() else value


def merge(below: Values, above: Values) -> dict[str, Any]:
    """The second over the first, key by key."""
    whole = dict(below)
    for name, value in above.items():
        under = whole.get(name) if isinstance(whole.get(name), dict) else {}
        whole[name] = merge(under, value) if isinstance(value, dict) else as_value(value)
    return whole


def merged(configs: Sequence[str], flags: Values) -> dict[str, Any]:
    """Configuration files over each other, and flags, named with dots, over these."""
    nested = [reduce(lambda value, part: {part: value}, reversed(name.split(".")), flags[name]) for name in flags]
    return reduce(merge, [*(read_yaml(config) for config in configs), *nested], {})


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The content of a YAML file; an InputError where there is none, or no names with values in it."""
    try:
        content = yaml.safe_load(Path(current_file(str(file))).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read ({error}): run this where configs/ lies") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds {content!r}: expected names with values, as in configs/")
    return content


def read_comparison(file: Path) -> Comparison:
    """A comparison's file, or one of `wandb sweep`; an InputError names the part that cannot be run."""
    content = read_yaml(file)
    try:
        content = {"name": file.stem} | (_from_sweep(content) if "command" in content else content)
        shared = {name: content.pop(name) for name in ("package", "budget") if name in content}
        varied = {name: content.pop(name, None) for name in ("parameters", "method", "run_cap")}
        configs, rows = content.pop("configs", []), content.get("rows", {"": None}).items()
        laid = {name: {**(row or {}), "configs": [*configs, *(row or {}).get("configs", [])]} for name, row in rows}
        made = [one for name, row in laid.items() for one in expand(Row(name, **shared | row), **varied)]
        return Comparison(**content | {"rows": made})
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        why = re.sub(r"\S*__init__\(\) ", "", str(error))
        raise InputError(f"{file} is no comparison ({why}): expected a file as in configs/comparisons") from error


def _from_sweep(content: Values) -> dict[str, Any]:
    """A file of `wandb sweep` in our terms; the best validation counts."""
    words = [str(word) for word in content["command"]]
    if not {"-m", "fit", "${args}"} <= set(words):
        raise InputError(f"command {' '.join(words)}: expected -m, a package, fit and ${{args}} in it")
    configs, flags = split_words([word for word in words[words.index("fit") + 1 :] if word != "${args}"])
    ours = {name: content[name] for name in ("name", "parameters", "method", "run_cap", "metric") if name in content}
    ours |= {"package": words[words.index("-m") + 1], "configs": configs, "flags": flags}
    return ours | {"at": "best", "report": [content["metric"]["name"]]}


def expand(row: Row, parameters: Values | None, method: str | None, run_cap: int | None) -> Iterator[Row]:
    """The row once for each combination or draw of its parameters; as it is where there are none."""
    parameters, dice = parameters or {}, random.Random(0)  # the same draws whenever the file is read
    if method not in (None, "grid", "random"):
        raise InputError(f"method {method}: expected grid or random; others need wandb's server")
    if method == "random":
        drawn = [[draw(name, choice, dice) for name, choice in parameters.items()] for _ in range(run_cap or 10)]
    else:
        drawn = itertools.product(*(values(name, choice) for name, choice in parameters.items()))
    for chosen in drawn:
        flags = dict(zip(parameters, chosen, strict=True))
        names = [f"{n.rpartition('.')[2]}={as_word(flags[n])}" for n in flags if "value" not in parameters[n]]
        yield replace(row, name=",".join(filter(None, (row.name, *names))) or "only", flags={**row.flags, **flags})


def values(name: str, choice: Values) -> Sequence[Any]:
    if not {"value", "values"} & set(choice):
        raise InputError(f"parameter {name} {dict(choice)}: expected value or values")
    return choice.get("values", [choice.get("value")])


def draw(name: str, choice: Values, dice: random.Random) -> Any:
    """One value of a parameter, by wandb's distributions."""
    if "min" not in choice or "max" not in choice:
        return dice.choice(values(name, choice))
    low, high = choice["min"], choice["max"]
    kind = choice.get("distribution", "uniform" if isinstance(low + high, float) else "int_uniform")
    if kind not in ("int_uniform", "uniform", "log_uniform_values"):
        raise InputError(f"parameter {name}: distribution {kind}: expected uniform, int_uniform or log_uniform_values")
    if kind == "int_uniform":
        return dice.randint(low, high)
    value = dice.uniform(low, high) if kind == "uniform" else math.exp(dice.uniform(math.log(low), math.log(high)))
    return float(f"{value:.4g}")


def split_words(words: Sequence[str], reserved: Sequence[str] = OWN_FLAGS) -> tuple[list[str], dict[str, str]]:
    """Configurations and flags among the words that follow a `fit`; an InputError for what is neither, or reserved."""
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            flags.append(word[2:].split("=", 1))
        elif flags and len(flags[-1]) == 1:
            flags[-1].append(word)
        else:
            raise InputError(f"{word}: expected a flag of fit, such as --data.batch_size=8")
    if taken := [name for name, *_ in flags if name in reserved]:
        raise InputError(f"--{taken[0]} is set for each run: use the comparison's own options, --help")
    named = [(name, value[0] if value else "true") for name, *value in flags]
    return [value for name, value in named if name == "config"], {n: v for n, v in named if n != "config"}


def runs_of(comparison: Comparison, words: Sequence[str]) -> list[Run]:
    """Each row with each seed, all rows of the first seed first; `words` are those of the command line."""
    configs, given = split_words(words, OWN_FLAGS + BUDGET_FLAGS * any(row.unit for row in comparison.rows))
    common, runs = {**comparison.flags, **given}, []
    for seed, row in itertools.product(comparison.seeds, comparison.rows):
        files = [*row.configs, *configs]
        own = {name: _looked_up(value, merged(files, common), row) for name, value in row.flags.items()}
        runs.append(
            Run(row, seed, files, {name: common[name] for name in common if name not in own} | own, comparison.name)
        )
    return runs


def _looked_up(value: Any, config: Values, row: Row) -> Any:
    """The value; of `${model.r}` what the row's configuration has there."""
    found = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    try:
        return value if found is None else reduce(lambda part, name: part[name], found[1].split("."), config)
    except (KeyError, TypeError) as error:
        raise InputError(f"row {row.name}: {value}: its configurations do not set that") from error
