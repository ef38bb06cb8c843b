"""What a run of the classifier shows: how its best validation judged the reviews, in its report and in W&B."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import wandb
import yaml

from classify.__main__ import main
from experiment.pages.predictions import Verdicts, read_verdicts
from tests.offline_wandb import Part, config_of, history_of, metrics_of, read_offline, run_ids, summary_of

WANDB = Path(__file__).parents[2] / "configs" / "wandb.yaml"
FLAGS = [
    "--model.learning_rate=0.3", "--trainer.log_every_n_steps=1", "--trainer.check_val_every_n_epoch=null",
    "--trainer.val_check_interval=2", "--checkpoint.every_n_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_run: list[str]) -> Path:
    """A run of four steps, resumed and taken to six, with W&B kept offline, as one of a group."""
    folder = tmp_path_factory.mktemp("dashboard") / "tiny"
    arguments = ["fit", f"--config={WANDB}", *small_run, *FLAGS, f"--run_dir={folder}", "--trainer.max_epochs=-1"]
    with pytest.MonkeyPatch.context() as patch:
        wandb.teardown()  # it reads the environment once a process
        patch.setenv("WANDB_RUN_GROUP", "table1")
        main([*arguments, "--trainer.max_steps=4"])
        main([*arguments, "--trainer.max_steps=6", "--report=true", "--ckpt_path=last"])
    return folder


@pytest.fixture(scope="module")
def verdicts(run: Path) -> Verdicts:
    return read_verdicts(run)


@pytest.fixture(scope="module")
def parts(run: Path) -> list[Part]:
    return read_offline(run)


def test_evaluation_is_that_of_the_best_validation_with_each_review_once(run: Path, verdicts: Verdicts) -> None:
    with (run / "metrics.csv").open() as file:
        validations = [row for row in csv.DictReader(file) if row["val/loss"]]
    best = min(validations, key=lambda row: float(row["val/loss"]))
    assert best["step"] == "2"  # neither the last, nor of the part that ended the run
    assert verdicts.source == "evaluation.jsonl"
    given = verdicts.probabilities[np.arange(len(verdicts.truth)), verdicts.truth]
    assert -np.log(given).mean() == pytest.approx(float(best["val/loss"]), abs=1e-4)
    assert verdicts.accuracy == pytest.approx(float(best["val/accuracy"]))
    config = f"--config={run / 'config.yaml'}"
    reviews = main(["validate", config, "--ckpt_path=best"]).datamodule.reviews("validation")
    assert verdicts.texts == reviews.texts and verdicts.truth.tolist() == reviews.labels.tolist()


def test_resumed_classifier_is_one_wandb_run_of_its_group_with_a_row_a_step(run: Path, parts: list[Part]) -> None:
    assert run_ids(parts) == [(run / "wandb/run-id.txt").read_text().strip()] * 2
    assert {record.run.run_group for part in parts for record in part if record.HasField("run")} == {"table1"}
    history = history_of(parts)
    assert [row["trainer/global_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    training = {"train/loss", "train/accuracy", "train/learning_rate"}
    assert all(training <= set(row) for row in history)
    validated = [row["trainer/global_step"] for row in history if {"val/loss", "val/accuracy", "val/f1"} <= set(row)]
    assert validated == [2, 4, 6]


def test_wandb_knows_the_classifiers_configuration_and_how_little_of_it_trains(run: Path, parts: list[Part]) -> None:
    config, used = config_of(parts[-1]), yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == used["model"] and config["data"] == used["data"]
    assert config["parameters"]["trainable"] == 2 * 3 * (8 * 32 + 32 * 8) + 2 * 32 + 2 < config["parameters"]["total"]


def test_wandb_summary_is_the_least_loss_and_the_highest_accuracy_of_the_whole_run(parts: list[Part]) -> None:
    history, summary = history_of(parts), summary_of(parts[-1])
    losses, accuracies = ([row[name] for row in history if name in row] for name in ("val/loss", "val/accuracy"))
    assert losses.index(min(losses)) == 0  # in the part before the resume
    assert summary["val/loss"] == {"min": pytest.approx(min(losses))}
    assert summary["val/accuracy"] == {"max": pytest.approx(max(accuracies))}
    defined = metrics_of(parts)
    assert defined["val/accuracy"].summary.max and not defined["val/accuracy"].summary.min
    assert defined["val/loss"].summary.min and not defined["val/loss"].summary.max


def test_wandb_has_the_predictions_as_a_table_and_their_confusion(run: Path, verdicts: Verdicts) -> None:
    newest = sorted((run / "wandb").glob("offline-run-*"))[-1] / "files" / "media" / "table"
    (predictions,) = newest.glob("predictions_*.table.json")
    table = json.loads(predictions.read_text())
    assert table["columns"] == ["text", "label", "true_label", "negative", "positive"]
    names = [verdicts.names[label] for label in verdicts.predicted]
    assert [row[:2] for row in table["data"]] == [list(pair) for pair in zip(verdicts.texts, names, strict=True)]
    assert [row[3:] for row in table["data"]] == verdicts.probabilities.tolist()
    (confusion,) = newest.glob("confusion*.table.json")
    cells = {(row[0], row[1]): row[2] for row in json.loads(confusion.read_text())["data"]}
    counts = verdicts.confusion()
    assert cells == {(a, b): counts[i, j] for i, a in enumerate(verdicts.names) for j, b in enumerate(verdicts.names)}


def test_report_of_a_classifier_shows_its_verdicts_and_its_learning_rate(run: Path, verdicts: Verdicts) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    for drawn in ("confusion-0", "calibration-0", "learning_rate", "accuracy"):
        assert f'id="{drawn}"' in page, drawn
    assert "20 texts of evaluation.jsonl" in page
    assert verdicts.mistakes()[0]["text"] in page
