"""Mistakes in a configuration are told all at once, before anything is written."""

from pathlib import Path

import pytest

from lm.__main__ import main
from tests.runs import TINY, refused, write_stories


def refused_fit(capsys: pytest.CaptureFixture, *flags: str) -> str:
    stories = write_stories(Path("stories"))
    error = refused(capsys, "fit", f"--data.path={stories}", "--run_dir=run", *TINY, *flags)
    assert not Path("run/config.yaml").exists()
    return error


def test_mistakes_of_several_parts_are_told_together(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    error = refused_fit(
        capsys, "--data.batch_size=0", "--model.decoder.num_heads=3", "--model.optimizer.learning_rate=-1",
        "--model.generation.temperature=-2",
    )  # fmt: skip
    assert all(word in error for word in ("batch_size 0", "num_heads=3", "learning_rate -1", "temperature=-2"))


def test_accumulation_and_validation_that_no_epoch_reaches_are_told_together(
    in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    error = refused_fit(
        capsys, "--trainer.accumulate_grad_batches=9", "--trainer.val_check_interval=10",
        "--trainer.check_val_every_n_epoch=1",
    )  # fmt: skip
    assert "accumulate_grad_batches 9 is more than the 8 batches" in error
    assert (
        "val_check_interval 10 is more than the 1 optimizer steps" in error and "check_val_every_n_epoch null" in error
    )


def test_stream_without_an_end_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    endless = ["--data.streaming=true", "--trainer.max_steps=-1", "--trainer.max_epochs=1"]
    assert "max_steps" in refused_fit(capsys, *endless)


def test_checkpoint_of_another_vocabulary_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    stories = write_stories(in_tmp / "stories")
    main(["fit", f"--data.path={stories}", "--run_dir=first", *TINY, "--trainer.max_steps=1"])
    flags = ["--ckpt_path=first/checkpoints/last.ckpt", "--data.vocab_size=346"]
    error = refused_fit(capsys, *flags)
    assert "embedding.weight is (345, 16), expected (346, 16)" in error and "tokenizer" in error
