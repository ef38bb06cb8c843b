"""Data for the demo's adapted model: letters that children write home, generated like the demo's stories.

tinylab letters FOLDER        # train.jsonl and validation.jsonl, always the same
"""

import json
from collections.abc import Sequence
from pathlib import Path

from experiment.command_parser import CommandParser, one_line_errors
from lm.data.demo_stories import DATA, draw_split

SIZES = {"validation": 100, "train": 2_000}  # in the order in which they are drawn
SEED = 7


def write_letters(split: str) -> list[str]:
    """The letters of ``train`` or ``validation``."""
    return draw_split(split, SEED, SIZES, DATA["letters"])


@one_line_errors()
def main(args: Sequence[str] | None = None) -> None:
    """Write both splits to a folder."""
    parser = CommandParser("tinylab letters", __doc__)
    parser.add_argument("folder", type=Path, help="folder to write to; created if missing")
    folder = parser.parse_args(args).folder
    folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        lines = (json.dumps({"text": letter}) + "\n" for letter in write_letters(split))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
