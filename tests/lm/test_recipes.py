"""Recipes side by side: real runs of a very small model, at equal tokens and at equal time."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from experiment import comparison
from experiment.summary import read_metrics
from lm.data import TinyStories
from lm.recipes import main, prepare, read_curve
from tests.runs import write_stories

SMALL = {
    "trainer": {"max_steps": 5, "accelerator": "cpu"},
    "data": {"path": "stories", "vocab_size": 345, "sequence_length": 16, "batch_size": 4},
    "model": {
        "decoder": {
            "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "max_sequence_length": 16
        },
        "optimizer": {"warmup_steps": 0},
    },
}  # fmt: skip


def write_recipe(name: str, **data: object) -> str:
    Path(f"{name}.yaml").write_text(yaml.safe_dump(SMALL | {"data": SMALL["data"] | data}))
    return f"{name}.yaml"


@pytest.fixture
def recipes(in_tmp: Path) -> list[str]:
    """Two recipes in the working directory, beside their stories: one truncates and pads, one is made to pack."""
    write_stories(Path("stories"))
    Path("packing.yaml").write_text("data: {packing: true}")
    return [write_recipe("cut"), "cut.yaml,packing.yaml"]


def test_recipe_is_run_once_at_equal_tokens_and_not_again_at_the_time_that_this_takes(
    recipes: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    batches = list(TinyStories(**SMALL["data"]).train_dataloader())
    budget = 2 * sum(int(batch["weights"].sum()) for batch in batches)  # two epochs, pads not counted
    flags = ["--seeds", "3", "--out=out", "--trainer.accumulate_grad_batches", "2"]
    main(["cut.yaml", f"--tokens={budget}", *flags])
    run = json.loads(Path("out/results.jsonl").read_text())
    assert (run["name"], run["seed"], run["tokens"]) == ("cut", 3, budget)
    rows = read_metrics(Path("out/runs") / run["key"])
    assert [row["step"] for row in rows if "val/loss" in row] == [*range(1, 9)]  # eight steps, each validated
    assert rows[-1]["train/learning_rate"] < 0.2 * rows[0]["train/learning_rate"]  # the schedule ends with the budget
    assert run["val_loss"] == rows[-1]["val/loss"] == run["curve"]["val_loss"][-1]
    assert 0 < run["training_seconds"] < run["seconds"] and run["memory_mib"] > 100

    with pytest.raises(SystemExit):  # once a step is timed
        main(["cut.yaml", "--seconds=1e-9", *flags])
    assert "steps of cut: expected at least one" in capsys.readouterr().err
    results = Path("out/results.jsonl").read_text()
    timed = json.loads(results.split("\n")[-1])
    monkeypatch.setattr(comparison.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("ran again"))
    main(["cut.yaml", f"--seconds={8 * timed['seconds_a_step']}", *flags])
    assert Path("out/results.jsonl").read_text() == results
    with Path("out/recipes.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["recipe"], row["tokens"], row["seeds"]) == ("cut", f"{budget:,}", "3")
    assert row["validation loss"] == f"{run['val_loss']:.4f}"
    assert "evaluation full" in Path("out/recipes.md").read_text()
    assert Path("out/recipes.png").stat().st_size > 10_000


def test_tokens_of_a_step_are_the_targets_that_it_trains(recipes: list[str]) -> None:
    cut, packed = (prepare(recipe, ["--trainer.accumulate_grad_batches=3"]) for recipe in recipes)
    assert packed.data.packing and not cut.data.packing
    for recipe in (cut, packed):
        batches = list(recipe.data.train_dataloader())
        steps = -(-len(batches) // 3)  # the last step of an epoch takes what is left
        assert recipe.tokens_a_step == sum(float(batch["weights"].sum()) for batch in batches) / steps


def test_curve_adds_up_tokens_and_the_time_of_training_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,train/tokens,train/tokens_per_second,val/bits_per_byte,val/loss\n"
        "1,100,50,,\n2,300,100,1.5,4\n3,400,25,,\n4,500,100,1.25,3\n"
    )
    assert read_curve(tmp_path) == {
        "tokens": [300, 500], "training_seconds": [4, 9], "val_bits_per_byte": [1.5, 1.25], "val_loss": [4, 3]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cut.yaml"], ["--tokens", "--seconds", "required"]),
        (["cut.yaml", "--tokens=1e3", "--seconds=9"], ["--seconds", "not allowed"]),
        (["cut.yaml", "--tokens=many"], ["--tokens", "'many'"]),
        (["nowhere.yaml", "--tokens=1e3"], ["nowhere.yaml", "does not exist"]),
        (["cut.yaml", "cut.yaml", "--tokens=1e3"], ["called cut"]),
        (["cut.yaml", "--tokens=9"], ["--tokens 9", "steps of cut", "at least one"]),
        (["cut.yaml", "--tokens=1e3", "--points=0"], ["--points 0"]),
        (["cut.yaml", "--tokens=1e3", "--trainer.max_steps", "9"], ["--trainer.max_steps is set for each run"]),
        (["--tokens=1e3", "cut.yaml"], ["cut.yaml: expected a flag"]),
        (["cut.yaml", "--tokens=1e3", "--data.batch_size=0"], ["batch_size 0"]),
        (["cut.yaml", "--tokens=1e3", "--data.streaming=true"], ["streams", "--seconds"]),
        (["cut.yaml", "other.yaml", "--tokens=1e3"], ["stories and elsewhere", "--data.path"]),
        (
            ["cut.yaml", "long.yaml", "--tokens=1e3", "--data.evaluation=report"],
            ["cut and long", "data.sequence_length"],
        ),
    ],
    ids=lambda value: value[-1][:24] if isinstance(value, list) else None,
)
def test_bad_input_ends_in_one_line_and_writes_nothing(
    arguments: list[str], words: list[str], recipes: list[str], capsys: pytest.CaptureFixture
) -> None:
    write_stories(Path("elsewhere"))
    write_recipe("other", path="elsewhere"), write_recipe("long", sequence_length=15)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out=out"])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and "\n" not in error
    assert all(word in error for word in words), error
    assert not Path("out").exists()
