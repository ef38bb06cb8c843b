"""What is given by hand on a resume takes effect or is refused, and config.yaml says what is true."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lm.__main__ import main
from tests.runs import TINY, assert_same_run, checkpoint, refused, rows, write_stories

FLAGS = [*TINY, "--samples.every_n_steps=0", "--model.optimizer.warmup_steps=2", "--trainer.val_check_interval=4",
         "--checkpoint.every_n_steps=100"]  # fmt: skip
MUON = "--model.optimizer.muon_learning_rate=0.02"


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return ["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *FLAGS, "--run_dir=run"]


def rates(run: str = "run") -> list[float]:
    return [float(row["train/learning_rate"]) for row in rows(Path(run))]


def refused_unchanged(capsys: pytest.CaptureFixture, *args: str) -> str:
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    error = refused(capsys, *args)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    return error


@pytest.mark.parametrize("muon", [[], [MUON]], ids=["adamw", "muon"])
def test_optimizer_options_take_effect_from_the_next_step_on(arguments: list[str], muon: list[str]) -> None:
    constant = "--model.optimizer.schedule=constant"
    main([*arguments, *muon, constant, "--trainer.max_steps=4"])
    new = {"learning_rate": 1e-5, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.7, "eps": 1e-5}
    new |= {"muon_learning_rate": 2e-5} if muon else {}
    flags = [f"--model.optimizer.{name}={value}" for name, value in new.items()]
    main([*arguments, *muon, constant, *flags, "--trainer.max_steps=8", "--ckpt_path=last"])
    assert rates()[:4] == pytest.approx([3e-4, 6e-4, 6e-4, 6e-4])
    assert rates()[4:] == pytest.approx([1e-5] * 4)
    groups = checkpoint(Path("run"))["optimizer_states"][0]["param_groups"]
    assert groups[0]["betas"] == (0.8, 0.7) and groups[0]["eps"] == 1e-5
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] + [0.3] * (len(groups) - 2)
    assert [group["lr"] for group in groups] == [1e-5] * 2 + [2e-5] * (len(groups) - 2)
    said = yaml.safe_load(Path("run/config.yaml").read_text())["model"]["optimizer"]
    assert new.items() <= said.items()


def test_schedule_warmup_and_number_of_steps_take_effect(arguments: list[str]) -> None:
    main([*arguments, "--trainer.max_steps=4"])
    wsd = [
        "--model.optimizer.schedule=wsd",
        "--model.optimizer.warmup_steps=8",
        "--model.optimizer.decay_fraction=0.25",
    ]
    main([*arguments, *wsd, "--trainer.max_steps=16", "--ckpt_path=last"])
    expected = [5, 6, 7, 8, 8, 8, 8, 8, 8, 0.775 * 8, 0.55 * 8, 0.325 * 8]
    assert rates()[4:] == pytest.approx([6e-4 * share / 8 for share in expected])


def test_clipping_dropout_and_accumulation_take_effect(arguments: list[str]) -> None:
    main([*arguments, "--trainer.max_steps=4", "--model.decoder.dropout=0"])
    cli = main([*arguments, "--trainer.max_steps=6", "--trainer.gradient_clip_val=1e-9", "--model.decoder.dropout=0",
                "--trainer.accumulate_grad_batches=2", "--ckpt_path=last"])  # fmt: skip
    assert cli.trainer.gradient_clip_val == 1e-9
    tokens = [float(row["train/tokens"]) for row in rows(Path("run"))]
    assert tokens[4] - tokens[3] > 1.5 * (tokens[1] - tokens[0])


def test_batch_size_takes_effect_at_the_same_place_of_the_epoch(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm.data.module import WindowBatches

    seen: list[list[int]] = []
    take = WindowBatches.__getitem__

    def recorded(self, indices):
        if self.width is not None:  # the training's
            seen.append([int(index) for index in indices])
        return take(self, indices)

    monkeypatch.setattr(WindowBatches, "__getitem__", recorded)
    main([*arguments, "--trainer.max_steps=16"])  # 29 stories: two epochs of 8 batches
    whole = [index for batch in seen for index in batch]
    for size, batches in ((8, 2), (2, 8)):  # after 4 of 8 batches of 4
        seen.clear()
        run = [*arguments, f"--run_dir=run-{size}"]
        main([*run, "--trainer.max_steps=4"])
        cli = main([*run, f"--trainer.max_steps={4 + batches}", f"--data.batch_size={size}", "--ckpt_path=last"])
        done = [index for batch in seen for index in batch]
        assert len(done) >= 29 and done == whole[: len(done)]
        assert cli.trainer.global_step == 4 + batches


EACH_EPOCH = ["--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"]


@pytest.mark.parametrize(
    ("limits", "validated"),
    [
        (["max_epochs=1", "max_epochs=2", "max_epochs=3"], []),
        (["max_epochs=1", "max_epochs=2", "max_epochs=3"], EACH_EPOCH),
        (["max_steps=8", "max_epochs=3"], EACH_EPOCH),
        (["max_epochs=1", "max_steps=16", "max_steps=24"], EACH_EPOCH),
        # Within an epoch, where a run's end would be one validation more.
        (["max_steps=4", "max_epochs=2", "max_epochs=3"], []),
        (["max_steps=12", "max_epochs=2", "max_steps=20", "max_steps=24"], []),
    ],
)
def test_epochs_that_are_added_later_are_trained_as_if_they_had_been_asked_for(
    arguments: list[str], limits: list[str], validated: list[str]
) -> None:
    epochs = [*arguments, *validated, "--trainer.max_steps=-1", "--model.optimizer.schedule=constant"]  # of 8 batches
    main([*epochs, "--trainer.max_epochs=3", "--run_dir=whole"])
    for limit in limits:
        resumed = ["--ckpt_path=last"] if limit != limits[0] else []
        main([*epochs, "--trainer.max_epochs=-1", f"--trainer.{limit}", *resumed])
    assert_same_run(Path("run"), Path("whole"), steps=24)


@pytest.mark.parametrize("limits", [["--trainer.max_epochs=3"], ["--trainer.max_steps=24", "--trainer.max_epochs=-1"]])
def test_checkpoint_at_the_end_of_an_epoch_resumes_with_the_next(arguments: list[str], limits: list[str]) -> None:
    ending = [*arguments, "--trainer.max_steps=-1", *limits, "--checkpoint.every_n_steps=8", "--checkpoint.keep=-1"]
    main([*ending, "--run_dir=whole"])
    for step in (8, 16):
        shutil.copytree("whole", "run")
        main([*ending, f"--ckpt_path=run/checkpoints/step-{step:06}.ckpt"])
        assert_same_run(Path("run"), Path("whole"), steps=24)
        shutil.rmtree("run")


def test_batch_size_of_a_run_that_ends_with_an_epoch_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    epochs = [*arguments, "--trainer.max_epochs=3"]
    main([*epochs, "--trainer.max_steps=4"])
    error = refused_unchanged(capsys, *epochs, "--trainer.max_steps=-1", "--data.batch_size=8", "--ckpt_path=last")
    assert "an epoch has 4 batches a process, and had 8" in error and "--trainer.max_steps" in error


def test_stream_that_would_be_cut_otherwise_is_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    main([*arguments, "--data.streaming=true", "--trainer.max_steps=4"])
    for flag, named in (("--data.batch_size=8", "--data.batch_size 4"), ("--data.streaming=false", "streaming true")):
        error = refused_unchanged(capsys, *arguments, "--data.streaming=true", flag, "--ckpt_path=last")
        assert named in error


def test_run_with_nothing_left_to_train_keeps_its_configuration(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    main([*arguments, "--trainer.max_steps=9"])
    before = {name: Path("run", name).read_bytes() for name in ("config.yaml", "metrics.csv")}
    for limit in ("--trainer.max_steps=3", "--trainer.max_epochs=1"):
        main([*arguments, limit, "--model.optimizer.learning_rate=1", "--ckpt_path=last"])
        said = " ".join(capsys.readouterr().out.split())
        assert "nothing is left to train: last.ckpt has 9 steps" in said
        assert f"raise {limit.partition('=')[0]} to continue" in said
        assert {name: Path("run", name).read_bytes() for name in before} == before


def test_another_seed_gives_other_random_numbers_and_the_same_one_none(arguments: list[str]) -> None:
    for name in ("run", "other"):
        main([*arguments, f"--run_dir={name}", "--trainer.max_steps=4", "--model.optimizer.schedule=constant"])
        seed = "--seed_everything=42" if name == "run" else "--seed_everything=7"
        main([*arguments, f"--run_dir={name}", "--trainer.max_steps=8", "--model.optimizer.schedule=constant", seed,
              "--ckpt_path=last"])  # fmt: skip
    main([*arguments, "--run_dir=whole", "--trainer.max_steps=8", "--model.optimizer.schedule=constant"])
    assert_same_run(Path("run"), Path("whole"), 8)
    assert rows(Path("other"))[:4] == rows(Path("whole"))[:4]
    assert rows(Path("other"))[5]["train/loss"] != rows(Path("whole"))[5]["train/loss"]


def test_patience_of_early_stopping_takes_effect(arguments: list[str]) -> None:
    stopping = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss",
                "--trainer.callbacks.mode=max", "--trainer.val_check_interval=1"]  # fmt: skip
    main([*arguments, *stopping, "--trainer.callbacks.patience=3", "--trainer.max_steps=2"])
    cli = main([*arguments, *stopping, "--trainer.callbacks.patience=5", "--ckpt_path=last"])
    assert cli.trainer.global_step == 6


@pytest.mark.parametrize("message", ["CUDA out of memory", "NCCL error"])
def test_only_a_disk_is_called_a_disk(message: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self, checkpoint):
        raise torch.OutOfMemoryError(message)

    monkeypatch.setattr("lm.training.module.LanguageModel.on_save_checkpoint", fails)
    with pytest.raises(torch.OutOfMemoryError, match=message):
        main([*arguments, "--trainer.max_steps=1"])
    assert not list(Path("run").rglob("*.partial"))
