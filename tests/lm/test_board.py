"""The board: entries that anyone can repeat from their line, and no others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiment.compare import runner as compare
from experiment.errors import InputError
from lm.board import Entry, main, read_entries, render, repeat
from tests.processes import Commands, fork_commands
from tests.runs import TINY, write_stories

ROOT = Path(__file__).parents[2]
ENTRIES = read_entries(ROOT / "results")
SHRUNK = [
    *(flag for flag in TINY if not flag.startswith(("--trainer.", "--checkpoint.", "--samples."))),
    "--trainer.accelerator=cpu", "--samples.every_n_steps=0", "--data.path=stories", "--data.tokenizer=train",
    "--model.compile=false", "--budget", "steps=2", "points=1", "--seeds", "1",
]  # fmt: skip
LINE = {
    "row": "mine", "seed": 1, "budget": {"tokens": 4e6, "points": 8}, "evaluated": "every token of every story of abc",
    "config": {"data": {"path": "here", "vocab_size": 345}},
    "curve": {"val/bits_per_byte": [2.0, 1.5], "tokens": [1, 4e6]},
    "environment": {"cpu": "CPU", "cores": 2, "source": "0123456", "precision": "32-true"},
    "date": "2026-11-27",
}  # fmt: skip


def test_board_is_that_of_its_entries() -> None:
    assert (ROOT / "BOARD.md").read_text(encoding="utf-8") == render(ENTRIES)
    assert {"report", "llama2c", "fast", "large_vocabulary"} <= {entry.name.partition("-")[0] for entry in ENTRIES}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entry_can_be_repeated_from_its_line(
    entry: Entry, in_tmp: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stories(Path("stories"))
    fork_commands(commands, monkeypatch)  # real runs, but quick to start
    repeat(entry, SHRUNK)
    (line,) = compare.read_results(Path("runs/comparisons")).values()
    assert line["curve"]["val/bits_per_byte"][-1] > 0 and line["config"]["data"]["vocab_size"] == 345
    assert line["config"]["model"]["optimizer"] == entry.config["model"]["optimizer"] | {"schedule": "cosine"}


def test_row_of_a_comparison_becomes_an_entry_and_a_line_of_the_board(in_tmp: Path) -> None:
    lines = [LINE, {**LINE, "seed": 2, "curve": {**LINE["curve"], "val/bits_per_byte": [1.7]}}]
    Path("lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["add", "mine", "--row", "mine", "--about", "My own.", "--from", "lines.jsonl"])
    (entry,) = read_entries()
    assert (entry.track, entry.bits_per_byte, entry.budget) == ("4 M tokens", [1.5, 1.7], {"tokens": 4e6})
    assert entry.config == {"data": {"vocab_size": 345}}  # where the stories lie is each reader's own
    main(["write"])
    row = "| 1.6000 ± 0.1414 | mine | 1, 2 | 4.0 M | My own. | CPU, 32-true | 0123456 | 2026-11-27 |"
    assert row in Path("BOARD.md").read_text()


def test_words_that_a_command_does_not_know_are_refused(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["write", "--nonsense"])
    assert "--nonsense: there is no such option" in capsys.readouterr().err and not Path("BOARD.md").exists()


def test_fewest_bits_stand_first_among_those_judged_by_the_same_text() -> None:
    worse = replace(ENTRIES[0], name="worse", bits_per_byte=[9.0], seeds=[1])
    better = replace(worse, name="better", bits_per_byte=[0.1])
    other = replace(worse, name="other", evaluated="other stories")
    page = render([worse, other, better])
    assert page.index("| better |") < page.index("| worse |") and page.count("## ") == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"commit": "0123456-dirty-89abcde"}, "commit the source"),
        ({"commit": ""}, "has no commit"),
        ({"config": {}}, "has no config"),
        ({"bits_per_byte": [1.0]}, "one for each"),
        ({"budget": {"seconds": 7}}, "expected one of"),
        ({"config": {"trainer": {"limit_val_batches": 2}}}, "limit_val_batches"),
        ({"luck": 1}, "luck: there is no such key; expected name, about"),
        ({"seed": 1}, "seed: there is no such key (did you mean seeds?)"),
        ({"seeds": 1}, "seeds 1: expected a list of whole numbers"),
        ({"date": None}, "has no date"),
    ],
)
def test_entry_that_nobody_could_repeat_is_refused(change: dict, words: str, in_tmp: Path, capsys) -> None:
    Path("results").mkdir()
    entry = {**vars(ENTRIES[0]), "seeds": [1, 2], "bits_per_byte": [1.0, 2.0]}
    Path("results/bad.jsonl").write_text(json.dumps(entry | change))
    with pytest.raises(InputError, match="line 1"):
        read_entries()
    with pytest.raises(SystemExit) as stop:
        main(["write"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
