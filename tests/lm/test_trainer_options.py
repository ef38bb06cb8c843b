"""Options of Lightning's Trainer do what they say with our loaders, callbacks and log."""

import logging
from pathlib import Path

import pytest
import torch

from lm.__main__ import main
from lm.training.module import LanguageModel
from tests.runs import TINY, assert_same_run, refused, rows, write_stories

SHORT = [*TINY, "--samples.every_n_steps=0"]  # 8 batches an epoch


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return [f"--data.path={write_stories(in_tmp / 'stories')}", *SHORT]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The token ids of every batch that was trained on."""
    seen: list[torch.Tensor] = []
    step = LanguageModel.training_step

    def recorded(self, batch, index):
        seen.append(batch["tokens"].clone())
        return step(self, batch, index)

    monkeypatch.setattr(LanguageModel, "training_step", recorded)
    return seen


def test_reloaded_loaders_go_on_with_the_order_of_the_next_epoch_and_resume_exactly(arguments: list[str]) -> None:
    flags = ["fit", *arguments, "--model.optimizer.schedule=constant", "--trainer.val_check_interval=4",
             "--model.decoder.dropout=0"]  # fmt: skip
    reload = "--trainer.reload_dataloaders_every_n_epochs=1"
    main([*flags, "--run_dir=whole", "--trainer.max_steps=20"])
    main([*flags, "--run_dir=reloaded", "--trainer.max_steps=20", reload])
    assert_same_run(Path("reloaded"), Path("whole"), 20)
    for steps in (12, 16, 20):  # within an epoch, and at the end of one
        main([*flags, "--run_dir=parts", f"--trainer.max_steps={steps}", reload, "--ckpt_path=last"])
    assert_same_run(Path("parts"), Path("whole"), 20)


def test_reloading_with_workers_is_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    flags = ["--trainer.reload_dataloaders_every_n_epochs=1", "--data.num_workers=1", "--run_dir=run"]
    assert "data.num_workers 0" in refused(capsys, "fit", *arguments, *flags)


def test_overfit_batches_repeats_the_same_batches(arguments: list[str], batches: list[torch.Tensor]) -> None:
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=6", "--trainer.overfit_batches=2"])
    assert len(batches) == 6 and not torch.equal(batches[0], batches[1])
    assert all(torch.equal(batches[i], batches[i + 2]) for i in range(4))


def test_overfit_batches_of_a_stream_are_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    flags = ["--data.streaming=true", "--trainer.overfit_batches=1", "--run_dir=run"]
    assert "trainer.overfit_batches 1" in refused(capsys, "fit", *arguments, *flags)


def test_stream_goes_on_where_the_last_epoch_was_cut(arguments: list[str], batches: list[torch.Tensor]) -> None:
    stream = ["--data.streaming=true", "--trainer.max_steps=6"]
    main(["fit", *arguments, "--run_dir=whole", *stream])
    main(["fit", *arguments, "--run_dir=cut", *stream, "--trainer.limit_train_batches=2"])
    assert all(torch.equal(whole, cut) for whole, cut in zip(batches[:6], batches[6:], strict=True))


def test_nothing_is_logged_between_validations_where_the_interval_is_0(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=6", "--trainer.log_every_n_steps=0"])
    assert [row["step"] for row in rows(Path("run"))] == ["5", "6"]
    error = refused(capsys, "fit", *arguments, "--run_dir=other", "--trainer.log_every_n_steps=-1")
    assert "trainer.log_every_n_steps -1: expected 0 (none) or more" in error


def test_what_was_asked_of_lightning_is_told_and_nothing_else(
    arguments: list[str], request: pytest.FixtureRequest
) -> None:
    told: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("lightning.pytorch")
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    request.addfinalizer(lambda: logger.removeHandler(handler))
    main(["fit", *arguments, "--run_dir=plain", "--trainer.max_steps=1"])
    main(["fit", *arguments, "--run_dir=plain", "--trainer.max_steps=2", "--ckpt_path=last"])
    assert told == [f"`Trainer.fit` stopped: `max_steps={steps}` reached." for steps in (1, 2)]
    told.clear()
    early = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss",
             "--trainer.callbacks.mode=max", "--trainer.callbacks.patience=1",
             "--trainer.callbacks.verbose=true"]  # fmt: skip
    main(["fit", *arguments, "--run_dir=run", "--trainer.profiler=simple", *early])
    assert any("Profiler Report" in message for message in told)
    assert any("did not improve" in message for message in told)
