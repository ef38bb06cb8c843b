"""The comparisons: real runs side by side, none of them twice, and tables made from what they left."""

import csv
import json
from pathlib import Path

import pytest

from classify import compare
from classify.__main__ import main
from experiment import comparison
from tests.offline_wandb import read_offline

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def line(accuracy: float, seed: int = 1, **figures: float | None) -> dict:
    values = {"train_loss": 0.5, "val_loss": 0.4, "test_accuracy": 0.8, "trainable": 1000, "seconds": 60.0}
    return values | {"memory_mib": None, "seed": seed, "val_accuracy": accuracy} | figures


def test_table1_runs_each_contender_once_and_goes_on_where_it_stopped(tmp_path, small_run, monkeypatch):
    flags = [f"--config={ROOT / 'configs' / 'wandb.yaml'}", *small_run]
    run = tmp_path / "runs" / compare.runs_of(compare.TABLE1, [1], flags)[0].key
    # Killed while it wrote the line of a run that had finished: the run goes on from its end.
    plain = compare.runs_of(compare.TABLE1, [1], small_run)[0].arguments
    fit = main(["fit", *plain, f"--run_dir={run}"])
    (tmp_path / "results.jsonl").write_text(f'{{"key": "{run.name}", "val_lo')

    arguments = ["table1", "--only", "custom", "words", "--seeds", "1", "--out", str(tmp_path), *flags]
    compare.main(arguments)
    results = (tmp_path / "results.jsonl").read_text()
    custom, words = map(json.loads, results.strip().split("\n")[1:])
    ended = {name: float(value) for name, value in fit.trainer.callback_metrics.items()}
    assert custom["val_loss"] == pytest.approx(ended["val/loss"])
    assert custom["val_accuracy"] == pytest.approx(ended["val/accuracy"])
    assert custom["seconds"] is None and words["seconds"] > 0
    assert custom["memory_mib"] > 100
    assert custom["trainable"] == 2 * 3 * (8 * 32 + 32 * 8) + 2 * 32 + 2
    assert 0 <= custom["test_accuracy"] <= 1
    assert words["val_accuracy"] > 0.5
    with (tmp_path / "table1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["approach"] for row in rows[:2]] == ["LoRA by hand", "bag of words, logistic regression"]
    assert (tmp_path / "table1.md").read_text().count("\n") == 2 + len(rows)
    assert (tmp_path / "table1.png").stat().st_size > 5000
    (part,) = read_offline(run)  # where W&B is on, the runs of a table are one group
    assert {record.run.run_group for record in part if record.HasField("run")} == {tmp_path.name}

    monkeypatch.setattr(comparison.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("ran again"))
    compare.main(arguments)
    assert (tmp_path / "results.jsonl").read_text() == results


def test_a_change_of_flags_is_another_run():
    def keys(*flags: str) -> list[str]:
        return [run.key for run in compare.runs_of(compare.ABLATION, [1], flags)]

    assert keys() == keys()
    assert len(set(keys())) == len(compare.ABLATION)
    assert not set(keys()) & set(keys("--data.max_length=128"))


def test_each_switch_of_the_ablation_changes_one_thing():
    arguments = {run.name: run.arguments for run in compare.runs_of(compare.ABLATION, [1], ["--model.r=4"])}
    assert "--model.lora_alpha=4" in arguments["scaling"]
    for name, contender in compare.ABLATION.items():
        if contender.config == "custom":
            assert set(arguments["right"]) <= set(arguments[name]), name
        assert contender.shows.endswith("."), name


def test_the_table_gives_mean_and_spread_over_seeds():
    results = {"custom": [line(0.90, 1), line(0.92, 2), line(0.88, 3)], "words": [line(0.87, seconds=None)]}
    header, rows = compare.table1_rows(results)
    by_title = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert by_title["LoRA by hand"]["accuracy"] == "0.9000 ± 0.0200"
    assert by_title["LoRA by hand"]["trainable parameters"] == "1,000"
    assert by_title["bag of words, logistic regression"]["seconds"] == ""
    assert by_title["source report, PEFT"]["accuracy"] == "0.6680"


def test_the_ablation_gives_points_against_the_right_configuration():
    header, rows = compare.ablation_rows({"right": [line(0.90)], "mask": [line(0.85)]})
    assert [dict(zip(header, row, strict=True))["points"] for row in rows] == ["", "-5.0"]


@pytest.mark.parametrize("arguments", [["table1", "--only", "nobody"], ["table1", "--run_dir", "x"]])
def test_bad_arguments_end_in_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --")
