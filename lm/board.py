"""The board: which configuration reaches the lowest bits per byte on real stories within a fixed budget.

    tinylab board add NAME --row ROW --about SENTENCE  # an entry: results/NAME.jsonl
    tinylab board write                                # BOARD.md from all entries
    tinylab board repeat NAME --data.path FOLDER       # rerun an entry

An entry is a line of JSON with everything its runs need except the stories, which are identified by their hash.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from experiment.command_parser import CommandParser, one_line_errors
from experiment.console import console
from experiment.errors import InputError
from experiment.invocation import command
from experiment.pages.summary import read_lines
from experiment.sources.keys import NUMBER, NUMBERS, check_keys

RESULTS, BOARD = Path("results"), Path("BOARD.md")
COLUMNS = "| bits per byte | entry | seeds | tokens | what | machine | commit | date |\n|" + "---|" * 8 + "\n"
HEADER = """# The board

Bits per byte on the validation stories for each training budget; lower is better. Written by `make board` from the
entries in `results/`: do not edit.

Add your own with three commands (then send `results/NAME.jsonl` and this page):

```
tinylab compare configs/comparisons/recipes.yaml --rows mine.yaml --budget seconds=1200 --data.path FOLDER
tinylab board add NAME --row mine --about SENTENCE
make board
```

FOLDER holds the stories ([docs/data.md](docs/data.md)). A budget is 300 or 1,200 seconds of training on two cores
(`taskset -c 0,1` takes two of many), 300 seconds on one GPU, or 4 M or 41 M tokens (`tokens=4e6`).
`tinylab board repeat NAME --data.path FOLDER` reruns an entry. Rows are ranked together if evaluated on the same
text, identified by its hash. Choices were made on these stories, so the best of many trials looks a little better
than it is.
"""
TRACKS = {  # the budgets
    "5 minutes of two cores": ("seconds", 300, "two cores"),
    "20 minutes of two cores": ("seconds", 1200, "two cores"),
    "5 minutes of one GPU": ("seconds", 300, "one GPU"),
    "4 M tokens": ("tokens", 4e6, "any machine"),
    "41 M tokens": ("tokens", 41e6, "any machine"),
}


KINDS = {  # of what a line holds
    **dict.fromkeys(("name", "about", "evaluated", "commit", "date"), str),
    **dict.fromkeys(("config", "budget", "machine"), dict),
    **{"seeds": NUMBERS, "bits_per_byte": list, "tokens": NUMBER},
}


@dataclass(frozen=True)
class Entry:
    """What was trained, and its results."""

    name: str
    about: str  # what it is, in a sentence
    config: dict[str, Any]  # every value set by its configurations and flags, except data.path
    budget: dict[str, float]  # of each run: {"seconds": 1200} or {"tokens": 4000000}
    seeds: list[int]  # of the runs
    bits_per_byte: list[float]  # at the end of each run
    tokens: float  # trained per run, on average
    evaluated: str  # what was predicted, with the hash of the validation stories
    machine: dict[str, Any]  # CPU or GPU, cores, precision
    commit: str  # of this source
    date: str

    def __post_init__(self) -> None:
        if missing := [name for name, value in vars(self).items() if not value]:
            raise InputError(f"{self.name or 'an entry'} has no {missing[0]}, which is needed to repeat it")
        if not len(self.seeds) == len(self.bits_per_byte) == len(set(self.seeds)):
            raise InputError(f"{self.name}: {self.bits_per_byte} of seeds {self.seeds}: expected one for each")
        if "-dirty" in self.commit:
            raise InputError(f"{self.name}: commit {self.commit}: commit the source and run it again")
        if "limit_val_batches" in self.config.get("trainer", {}):
            raise InputError(f"{self.name} sets trainer.limit_val_batches: expected all of the validation stories")
        _ = self.track

    @property
    def track(self) -> str:
        """The track, one of TRACKS, that the entry belongs to."""
        hardware = "one GPU" if "gpu" in self.machine else "two cores" if self.machine.get("cores") == 2 else "others"
        for title, (unit, number, where) in TRACKS.items():
            if self.budget.get(unit) == number and where in (hardware, "any machine"):
                return title
        raise InputError(f"{self.name}: budget {self.budget} on {hardware}: expected one of {', '.join(TRACKS)}")


def read_entries(folder: Path = RESULTS) -> list[Entry]:
    """All entries; an InputError names the file, the line and what is missing."""
    entries = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entries.append(Entry(**dict.fromkeys(KINDS) | check_keys(json.loads(text), KINDS)))
            except ValueError as error:
                raise InputError(f"{file}, line {number}: {error}") from error
    return entries


def add(name: str, about: str, file: Path, row: str) -> None:
    """Make an entry from the runs of one row of a comparison's results file."""
    lines = [line for line in read_lines(file) if line["row"] == row]
    if not lines or any("failed" in line for line in lines):
        raise InputError(f"--row {row}: {file} has {len(lines)} runs of it: expected at least one, and none failed")
    first, seen = lines[0], lines[0].get("environment", {})
    seen = {"cpu": seen.get("processor"), **seen}  # its name in older runs
    data = {key: value for key, value in first["config"].get("data", {}).items() if key != "path"}
    entry = Entry(
        name=name,
        about=about,
        config={**first["config"], "data": data},
        budget={unit: value for unit, value in first["budget"].items() if unit != "points"},
        seeds=[line["seed"] for line in lines],
        bits_per_byte=[round(line["curve"]["val/bits_per_byte"][-1], 5) for line in lines],
        tokens=round(mean(line["curve"]["tokens"][-1] for line in lines)),
        evaluated=first.get("evaluated", ""),
        machine={key: seen[key] for key in ("cpu", "gpu", "cores", "precision", "torch") if seen.get(key)},
        commit=seen.get("source", ""),
        date=first.get("date", ""),
    )
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(vars(entry)) + "\n")
    console.print(f"added to {stream.name}; next: {command('board')} write")


def render(entries: Sequence[Entry]) -> str:
    """The page: a table for each budget and text, lowest bits per byte first."""
    parts = [HEADER]
    for track, evaluated in dict.fromkeys((entry.track, entry.evaluated) for entry in entries):
        parts.append(f"\n## {track}\n\nEvaluated on {evaluated} (their hash).\n\n{COLUMNS}")
        there = [entry for entry in entries if (entry.track, entry.evaluated) == (track, evaluated)]
        for entry in sorted(there, key=lambda entry: mean(entry.bits_per_byte)):
            spread = f" ± {stdev(entry.bits_per_byte):.4f}" if len(entry.seeds) > 1 else ", one seed"
            machine = [entry.machine[key] for key in ("gpu", "cpu", "precision") if key in entry.machine]
            cells = [f"{mean(entry.bits_per_byte):.4f}{spread}", entry.name, ", ".join(map(str, entry.seeds))]
            cells += [f"{entry.tokens / 1e6:.1f} M", entry.about, ", ".join(machine), entry.commit, entry.date]
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def repeat(entry: Entry, words: Sequence[str], folder: Path = Path("runs/board")) -> None:
    """Run the entry's configuration, budget and seeds as a comparison of one row; `words` are extra flags."""
    from experiment.compare.runner import main as compare

    folder.mkdir(parents=True, exist_ok=True)
    config, file = folder / f"{entry.name}.yaml", folder / f"repeat-{entry.name}.yaml"
    config.write_text(yaml.safe_dump(entry.config, sort_keys=False), encoding="utf-8")
    comparison = {"package": "lm", "metric": {"name": "val/bits_per_byte", "goal": "minimize"}, "seeds": entry.seeds}
    comparison["report"] = ["val/loss", "val/bits_per_byte", "tokens", "training_seconds"]
    comparison["rows"] = {entry.name: {"configs": [str(config)], "budget": entry.budget}}
    file.write_text(yaml.safe_dump(comparison), encoding="utf-8")
    console.print(f"the entry had {entry.bits_per_byte} with seeds {entry.seeds}, evaluated on {entry.evaluated}")
    compare([str(file), *words])


@one_line_errors()
def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    parser = CommandParser("tinylab board", __doc__, whole=True)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="make an entry of a comparison's row")
    adding.add_argument("name", help="name of the entry")
    adding.add_argument("--row", required=True, help="row of the comparison")
    adding.add_argument("--about", required=True, help="description of the entry, in a sentence")
    comparison = Path("runs/comparisons/recipes/recipes.jsonl")
    adding.add_argument(
        "--from", dest="file", type=Path, default=comparison, help="results of the comparison; by default %(default)s"
    )
    commands.add_parser("write", help="write BOARD.md")
    repeating = commands.add_parser("repeat", help="rerun an entry")
    repeating.add_argument("name", help="name of the entry; flags of fit may follow, such as --data.path FOLDER")
    options, words = parser.parse_known_args(args)
    if words and options.command != "repeat":
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if options.command == "add":
        add(options.name, options.about, options.file, options.row)
    elif options.command == "write":
        BOARD.write_text(render(read_entries()), encoding="utf-8")
        console.print(f"written: {BOARD}")
    else:
        entries = {entry.name: entry for entry in read_entries()}
        if options.name not in entries:
            raise InputError(f"{options.name} is not an entry: expected one of {', '.join(entries)}")
        repeat(entries[options.name], words)


if __name__ == "__main__":
    main()
