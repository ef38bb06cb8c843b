"""The demo's corpus: synthetic stories from a seeded generator, for machines without a network.

Plots and word lists are in demo_stories.yaml, in the style of TinyStories (Eldan & Li 2023, arXiv:2305.07759): a child
or an animal, a want, an obstacle, some talk, help, and a small lesson, in words that a four-year-old knows. They are
not TinyStories; results on them say nothing about real text. They are regular enough for a small model
to learn sentences, dialogue and plots within a minute, and too many (12,500 distinct ones) to be memorized.
"""

import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from datasets import Dataset

DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PRONOUNS, GROWN_UPS, WORDS, PLOTS = DATA["pronouns"], DATA["grown_ups"], DATA["words"], DATA["plots"]
SIZES = {"validation": 500, "train": 12_000}  # in the order in which they are drawn
SEED = 2023

Template = list["str | tuple[Template, ...]"]  # text, "{word}", or a tuple of alternatives

_MARKS = re.compile(r"([\[\]|]|\{\w+\})")


@cache
def _parse(text: str) -> Template:
    levels: list[list[Template]] = [[[]]]  # for each open bracket: its alternatives so far
    for part in _MARKS.split(text):
        if part == "[":
            levels.append([[]])
        elif part == "|":
            levels[-1].append([])
        elif part == "]":
            alternatives = tuple(levels.pop())
            levels[-1][-1].append(alternatives)
        elif part:
            levels[-1][-1].append(part)
    return levels[0][0]


@cache
def _plot(text: str) -> tuple[list[str], list[dict[str, str]], Template]:
    """The possible actors of a plot, the rows of its table, and its story with a line per paragraph."""
    head, *paragraphs = text.split("\n\n")
    actors, names, *rows = head.split("\n")
    cells = ([cell.strip() for cell in row.split("|")] for row in (names, *rows))
    names = next(cells)
    story = "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return actors.split(), [dict(zip(names, row, strict=True)) for row in cells], _parse(story)


def _cast(actors: str, draw: random.Random) -> dict[str, str]:
    """The words of one story: a hero (name, kind, he, him, his), a friend (f...), a grown-up (m...), small things."""
    sex, fsex = draw.choice(("girl", "boy")), draw.choice(("girl", "boy"))
    mom = draw.choice(("mom", "mom", *GROWN_UPS))
    name = draw.choice(DATA["names"][f"{actors} {sex}"].split())
    friend = draw.choice([other for other in DATA["names"][f"{actors} {fsex}"].split() if other != name])
    hobby, hobby2 = draw.sample(WORDS[f"{actors} hobby"].split(","), 2)
    kind, fkind = (sex, fsex) if actors == "child" else draw.sample(WORDS["kind"].split(","), 2)
    words = {"name": name, "friend": friend, "kind": kind, "fkind": fkind, "mom": mom, "hobby": hobby, "hobby2": hobby2}
    words["home"] = draw.choice(WORDS[f"{actors} home"].split(","))
    words["indoor"] = draw.choice(WORDS["indoor"].split(","))
    if actors == "animal":
        words["pal"] = "friend {friend} the {fkind}"
    for prefix, one in (("", sex), ("f", fsex), ("m", GROWN_UPS[mom])):
        words |= zip((prefix + "he", prefix + "him", prefix + "his"), PRONOUNS[one].split(), strict=True)
    return words


def _tell(template: Template, words: dict[str, str], draw: random.Random) -> str:
    told = []
    for part in template:
        if isinstance(part, tuple):
            told.append(_tell(part[int(draw.random() * len(part))], words, draw))
        elif part[0] == "{":
            name = part[1].lower() + part[2:-1]
            value = _tell(_parse(words[name]), words, draw)
            told.append(value if part[1] == name[0] else value[0].upper() + value[1:])
        else:
            told.append(part)
    return "".join(told)


def write_story(draw: random.Random, plots: Sequence[str] = PLOTS) -> str:
    """One story of 80 to 200 words, a line per paragraph, from the demo's plots or the given ones."""
    actors, rows, story = _plot(draw.choice(plots))
    return _tell(story, DATA["phrases"] | _cast(draw.choice(actors), draw) | draw.choice(rows), draw)


@cache
def demo_texts(split: str) -> list[str]:
    """The stories of ``train`` or ``validation``: deterministic, all distinct, none in both."""
    return draw_split(split, SEED, SIZES, PLOTS)


def draw_split(split: str, seed: int, sizes: dict[str, int], plots: Sequence[str]) -> list[str]:
    """The texts of one split; splits are drawn in order from the plots, all texts distinct, none in two splits."""
    draw, stories, drawn = random.Random(seed), {}, 0
    for name, size in sizes.items():
        drawn += size
        while len(stories) < drawn:  # a dictionary drops duplicates and keeps the order
            stories[write_story(draw, plots)] = None
        if name == split:
            return list(stories)[drawn - size :]
    raise ValueError(f"split {split!r}: expected one of {', '.join(sizes)}")


def demo_stories(split: str) -> "Dataset | None":
    """`demo_texts` as a data set with a ``text`` column; None for a split that the demo lacks."""
    import datasets  # a slow import: one second

    return datasets.Dataset.from_dict({"text": demo_texts(split)}) if split in SIZES else None
