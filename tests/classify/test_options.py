"""What is given to the classifier by hand takes effect or is refused, and what one call settles is not written down."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from classify.__main__ import main
from classify.reviews import synthetic_reviews
from tests import runs
from tests.runs import rows

refused = partial(runs.refused, package="classify")
FLAGS = ["--trainer.log_every_n_steps=1", "--report=false", "--run_dir=run"]


def test_rate_and_decay_given_on_a_resume_take_effect(small_run: list[str], in_tmp: Path) -> None:
    steps = [*small_run, *FLAGS, "--trainer.max_epochs=-1"]
    main(["fit", *steps, "--trainer.max_steps=4"])
    new = ["--model.learning_rate=1e-6", "--model.weight_decay=0.5", "--trainer.max_steps=8"]
    cli = main(["fit", *steps, *new, "--ckpt_path=last"])
    rates = [float(row["train/learning_rate"]) for row in rows(Path("run"))]
    assert len(rates) == 8 and max(rates[4:]) <= 1e-6 < min(rates[1:4])
    assert [group["weight_decay"] for group in cli.trainer.optimizers[0].param_groups] == [0.5, 0.5, 0.0]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model"]["learning_rate"] == 1e-6


def test_run_of_another_optimizer_is_refused_before_anything_is_written(
    small_run: list[str], in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    """An earlier version had no group of its own for B."""
    main(["fit", *small_run, *FLAGS, "--trainer.max_steps=2"])
    file = Path("run/checkpoints/last.ckpt").resolve()
    checkpoint = torch.load(file, weights_only=True)
    first, second, *others = checkpoint["optimizer_states"][0]["param_groups"]
    first["params"] += second["params"]
    checkpoint["optimizer_states"][0]["param_groups"] = [first, *others]
    torch.save(checkpoint, file)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    error = refused(capsys, "fit", *small_run, *FLAGS, "--trainer.max_steps=4", "--ckpt_path=last")
    assert "another optimizer" in error and "start a new run" in error
    assert {path: path.read_bytes() for path in before} == before


def test_what_follows_from_other_options_is_not_frozen(small_run: list[str], in_tmp: Path) -> None:
    main(["fit", *small_run, *FLAGS, "--trainer.max_steps=1"])
    data = yaml.safe_load(Path("run/config.yaml").read_text())["data"]
    assert data["order_seed"] is data["tokenizer"] is None
    main(["fit", "--config=run/config.yaml", "--run_dir=again"])
    assert rows(Path("again")) == rows(Path("run"))


def test_no_end_and_overfitting(small_run: list[str], in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--trainer.max_steps" in refused(capsys, "fit", *small_run, *FLAGS, "--trainer.max_epochs=-1")
    assert not Path("run").exists()
    cli = main(["fit", *small_run, *FLAGS, "--trainer.overfit_batches=1", "--trainer.max_epochs=3"])
    assert cli.trainer.global_step == 3


@pytest.mark.parametrize("label", [{}, {"label": -1}], ids=["none", "-1"])
def test_test_split_without_labels_is_predicted_and_not_tested(
    label: dict, small_run: list[str], in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("reviews").mkdir()
    for split in ("train", "validation", "test"):
        reviews = synthetic_reviews("train" if split == "train" else "validation")
        lines = [{"text": reviews["text"][i], "label": reviews["label"][i]} for i in range(400)]
        if split == "test":
            lines = [{"text": f"{line['text']} Indeed.", **label} for line in lines]
        Path("reviews", f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main(["fit", *small_run, *FLAGS, "--data.path=reviews", "--trainer.max_steps=1"])
    main(["predict", "--config=run/config.yaml", "--ckpt_path=last"])
    lines = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all("true_label" not in line for line in lines)
    assert "no labels" in refused(capsys, "test", "--config=run/config.yaml", "--ckpt_path=last")
