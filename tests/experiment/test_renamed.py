"""Names of the last release go on working, with a note on stderr that gives today's."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

import experiment.renamed
from classify.__main__ import main as classify
from experiment.renamed import DATA_MODULES, RENAMED, current_arguments, current_checkpoint, current_config
from lm.__main__ import main
from tests.runs import TINY, assert_same_run, write_stories

OLD = {new: old for old, new in (RENAMED | DATA_MODULES).items()}


@pytest.fixture(autouse=True)
def unseen() -> None:
    experiment.renamed._note.cache_clear()


def test_flags_take_their_new_names(capsys) -> None:
    given = [
        "fit", "--config=configs/lm/report.yaml", "--config", "configs/classify/report.yaml", "--data.beginnings=true",
        "--model.generation.weights", "int8", "--data.evaluation=report", "--data.evaluation", "report",
        "--model.adapter", "none", "--trainer.logger+=experiment.wandb_logger.WandbLogger", "--data.path", "report",
    ]  # fmt: skip
    assert current_arguments(given) == [
        "fit", "--config=configs/lm/paper.yaml", "--config", "configs/classify/paper.yaml",
        "--data.extra_first_windows=true", "--model.generation.weight_dtype", "int8", "--data.evaluation=first_window",
        "--data.evaluation", "first_window", "--model.adapter", "full",
        "--trainer.logger+=experiment.pages.wandb_logger.WandbLogger", "--data.path", "report",
    ]  # fmt: skip
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == len(set(notes)) == 7
    assert "note: data.beginnings is now data.extra_first_windows; the old name works until the next release" in notes


def test_every_renamed_class_and_file_exists() -> None:
    for old, new in RENAMED.items():
        if new.endswith(".yaml"):
            assert Path(new).is_file()
            assert not Path(old).exists()
        elif old.startswith("experiment."):
            module, _, name = new.rpartition(".")
            assert hasattr(__import__(module, fromlist=[name]), name)


def with_old_names(config: dict, within: str = "") -> dict:
    renamed = {}
    for key, value in config.items():
        name = f"{within}{key}"
        if isinstance(value, dict):
            value = with_old_names(value, f"{name}.")
        elif f"{name}={value}" in OLD:
            value = OLD[f"{name}={value}"].partition("=")[2]
        renamed[OLD.get(name, name).removeprefix(within)] = value
    return renamed


def test_run_of_the_last_release_is_resumed(in_tmp: Path, capsys) -> None:
    """Its config.yaml and checkpoint have the old names; it goes on as if it had never stopped."""
    same = [f"--data.path={write_stories(Path('stories'))}", *TINY, "--data.packing=true"]
    same += ["--data.extra_first_windows=true", "--data.evaluation=first_window"]
    main(["fit", *same, "--run_dir=whole", "--trainer.max_steps=26"])
    main(["fit", *same, "--run_dir=run", "--trainer.max_steps=26", "--trainer.limit_val_batches=1.0", "--report=false",
          "--checkpoint.keep=-1"])  # fmt: skip
    file, new = Path("run/config.yaml"), yaml.safe_load(Path("run/config.yaml").read_text())
    old = with_old_names(new)
    assert old["data"]["beginnings"] is True
    assert old["data"]["evaluation"] == "report"
    assert "weights" in old["model"]["generation"]
    file.write_text(yaml.safe_dump(old))
    checkpoint = torch.load("run/checkpoints/step-000012.ckpt", weights_only=True)
    checkpoint["TinyStories"] = checkpoint.pop("TextDataModule")
    checkpoint["hyper_parameters"] = with_old_names(checkpoint["hyper_parameters"], "model.")
    assert "weights" in checkpoint["hyper_parameters"]["generation"]
    for left in Path("run/checkpoints").glob("*.ckpt"):
        left.unlink()
    torch.save(checkpoint, "run/checkpoints/step-000012.ckpt")
    Path("run/checkpoints/last.ckpt").symlink_to("step-000012.ckpt")
    capsys.readouterr()
    main(["fit", "--config=run/config.yaml", "--run_dir=run", "--ckpt_path=last", "--checkpoint.keep=1"])
    assert "data.beginnings is now data.extra_first_windows" in capsys.readouterr().err
    assert yaml.safe_load(file.read_text())["data"] == new["data"]
    assert_same_run(Path("run"), Path("whole"))


def test_checkpoint_of_the_last_release_takes_the_new_names_without_a_note(capsys) -> None:
    new = {"TextClassificationDataModule": {"epoch": 1}, "hyper_parameters": {"adapter": "full", "r": 8}}
    old = {"IMDB": {"epoch": 1}, "hyper_parameters": {"adapter": "none", "r": 8}}
    current_checkpoint(old)
    assert old == new
    current_checkpoint(old)
    assert old == new
    assert not capsys.readouterr().err


def test_todays_names_stay_as_they_are(capsys) -> None:
    for file in Path("configs").rglob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        assert current_config(copy.deepcopy(content)) == content
    assert not capsys.readouterr().err


def test_a_name_that_was_never_there_is_still_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        classify(["fit", "--data.path=demo", "--data.beginning=true"])
    assert "there is no such option" in capsys.readouterr().err
