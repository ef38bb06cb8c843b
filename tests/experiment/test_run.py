"""A run has a folder of its own, and only checkpoints that are safe and whole are read."""

import os
from pathlib import Path

import pytest
import torch

from experiment.errors import InputError
from experiment.runs.provenance import missing_run
from experiment.runs.reading import read_checkpoint, resolve_checkpoint
from experiment.runs.run import resolve_run_dir


def make_run(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    return folder


def test_new_runs_take_the_name_of_the_config_and_a_number(in_tmp: Path) -> None:
    config = [Path("configs/lm/demo.yaml"), Path("configs/wandb.yaml")]
    assert resolve_run_dir("lm", "fit", None, config, None) == Path("runs/lm/demo")
    make_run(Path("runs/lm/demo"))
    assert resolve_run_dir("lm", "fit", None, config, None) == Path("runs/lm/demo-2")
    make_run(Path("runs/lm/demo-2"))
    assert resolve_run_dir("lm", "fit", None, config, None) == Path("runs/lm/demo-3")


def test_last_means_the_newest_run_of_that_config(in_tmp: Path) -> None:
    config = [Path("configs/lm/demo.yaml")]
    make_run(Path("runs/lm/demo"))
    make_run(Path("runs/lm/demo-2"))
    for command in ("fit", "validate", "predict"):
        assert resolve_run_dir("lm", command, None, config, "last") == Path("runs/lm/demo-2")


def test_config_of_a_run_means_that_run_and_repeats_beside_it(in_tmp: Path) -> None:
    make_run(Path("runs/lm/demo"))
    make_run(Path("runs/lm/demo-2"))
    config = [Path("runs/lm/demo/config.yaml")]
    assert resolve_run_dir("lm", "validate", None, config, "best") == Path("runs/lm/demo")
    assert resolve_run_dir("lm", "fit", None, config, "last") == Path("runs/lm/demo")
    assert resolve_run_dir("lm", "fit", None, config, None) == Path("runs/lm/demo-3")


def test_second_training_never_writes_into_the_first(in_tmp: Path) -> None:
    make_run(Path("mine"))
    with pytest.raises(InputError, match=r"already holds a run: .* delete the folder, or name another"):
        resolve_run_dir("lm", "fit", "mine", [], None)
    assert resolve_run_dir("lm", "fit", "mine", [], "last") == Path("mine")
    assert resolve_run_dir("lm", "fit", "mine", [], "mine/checkpoints/last.ckpt") == Path("mine")


def test_checkpoint_path_alone_finds_its_run(in_tmp: Path) -> None:
    make_run(Path("elsewhere"))
    assert resolve_run_dir("lm", "predict", None, [], "elsewhere/checkpoints/best.ckpt") == Path("elsewhere")


def test_resuming_before_anything_was_saved_starts_at_the_beginning(in_tmp: Path) -> None:
    assert resolve_checkpoint("fit", Path("runs/lm/demo"), "last") is None
    with pytest.raises(InputError, match="does not exist: expected a run folder"):
        resolve_checkpoint("validate", Path("runs/lm/demo"), "last")


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_truncated_checkpoint_is_refused(in_tmp: Path, share: float) -> None:
    torch.save({"state_dict": {"weight": torch.randn(1000)}, "global_step": 3}, "whole.ckpt")
    data = Path("whole.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"cut\.ckpt"):
        read_checkpoint(Path("cut.ckpt"))
    assert read_checkpoint(Path("whole.ckpt"))["global_step"] == 3


def test_checkpoint_that_would_run_code_is_refused_and_runs_nothing(in_tmp: Path) -> None:
    torch.save({"state_dict": {}, "bad": Harmful()}, "harmful.ckpt")
    with pytest.raises(InputError, match="refused"):
        read_checkpoint(Path("harmful.ckpt"))
    assert not Path("harmed").exists()


def test_missing_run_names_the_newest_ones_by_their_shortest_names(in_tmp: Path) -> None:
    for age, name in enumerate(["demo-2/lm", "demo-2/peft", "demo-1/lm", "lm/f", "lm/e", "lm/d"]):
        make_run(run := Path("runs") / name)
        os.utime(run, (2e9 - age, 2e9 - age))
    Path("runs/demo").symlink_to("demo-2")
    there = "runs/demo/lm, runs/demo/peft, runs/demo-1/lm, runs/lm/f, runs/lm/e …"
    assert f"run nowhere does not exist (there are {there}): " in str(missing_run(Path("nowhere"), "checkpoint"))
    within = "run runs/demo holds no checkpoint (its runs are runs/demo/lm, runs/demo/peft): "
    assert within in str(missing_run(Path("runs/demo"), "checkpoint"))
    make_run(Path("runs/lm/mine"))
    assert "(did you mean runs/demo/lm?)" in str(missing_run(Path("runs/lm/demo"), "checkpoint"))
