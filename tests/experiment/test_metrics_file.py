"""metrics.csv has one row a logged step, also after a resume."""

import csv
from pathlib import Path

from experiment.runs.loggers import MetricsFile


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_training_and_validation_of_a_step_share_its_row(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"train/loss": 3.0}, step=1)
    file.log_metrics({"train/loss": 2.0}, step=2)
    file.log_metrics({"val/loss": 2.5}, step=2)
    assert rows(tmp_path) == [
        {"step": "1", "train/loss": "3.0", "val/loss": ""},
        {"step": "2", "train/loss": "2.0", "val/loss": "2.5"},
    ]


def test_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    killed = MetricsFile(tmp_path)
    for step in range(1, 6):
        killed.log_metrics({"train/loss": float(step)}, step=step)
    resumed = MetricsFile(tmp_path)
    resumed.rewind(3)
    for step in range(4, 7):
        resumed.log_metrics({"train/loss": float(step), "val/loss": 1.0}, step=step)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4", "5", "6"]
    assert [row["val/loss"] for row in rows(tmp_path)] == ["", "", "", "1.0", "1.0", "1.0"]


def test_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n1,3.0,2.0\n2,2.")
    file = MetricsFile(tmp_path)
    file.rewind(2)
    assert [row["step"] for row in rows(tmp_path)] == ["1"]
