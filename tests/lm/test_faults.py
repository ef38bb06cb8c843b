"""Full disks, folders that cannot be written, damaged checkpoints, numbers that go wrong: one line, nothing lost."""

import subprocess
from pathlib import Path

import pytest
import torch

from experiment.runs.checkpoints import BestCheckpoint
from experiment.runs.reading import read_checkpoint
from lm.__main__ import main
from tests.processes import Commands, Process
from tests.runs import TINY, refused, write_stories

QUIET = ["--samples.every_n_steps=0"]


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return [f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, *QUIET, "--run_dir=run"]


def the_error(process: Process) -> str:
    """The one line with which a command ends that cannot go on."""
    assert process.wait() == 2, process.output
    lines = [line for line in process.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in process.output, process.output
    return lines[0]


def test_disk_that_fills_up_ends_the_run_and_leaves_the_last_checkpoint(
    arguments: list[str], commands: Commands
) -> None:
    commands.run("fit", *arguments, "--trainer.max_steps=6")
    size = Path("run/checkpoints/last.ckpt").stat().st_size
    process = commands.start("fit", *arguments, "--ckpt_path=last", largest_file=size // 2)
    error = the_error(process)
    assert "step-000009.ckpt cannot be written" in error and "last good checkpoint" in error
    assert read_checkpoint(Path("run/checkpoints/last.ckpt"))["global_step"] == 6
    assert not list(Path("run").rglob("*.partial"))
    commands.run("fit", *arguments, "--ckpt_path=last")


@pytest.fixture
def read_only(in_tmp: Path) -> Path:
    """A folder that nobody can write to, root included."""
    folder = in_tmp / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        folder.chmod(0o500)
        try:
            (folder / "probe").touch()
        except OSError:
            yield folder
            folder.chmod(0o700)
            return
        (folder / "probe").unlink()
        pytest.skip("needs a folder that cannot be written: neither a mount nor permissions give one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_run_folder_that_cannot_be_written_is_refused(
    arguments: list[str], read_only: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, f"--run_dir={read_only / 'run'}"])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert str(read_only) in error and "cannot be written" in error and "\n" not in error


def test_resuming_from_a_cut_checkpoint_is_refused_and_the_best_one_still_loads(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    main(["fit", *arguments, "--trainer.max_steps=6"])
    last = Path("run/checkpoints/last.ckpt").resolve()
    whole, before = last.read_bytes(), Path("run/metrics.csv").read_text()
    for share in (0.1, 0.5, 0.9, 0.999):
        last.write_bytes(whole[: int(len(whole) * share)])
        error = refused(capsys, "fit", *arguments, "--ckpt_path=last")
        assert "truncated or not a checkpoint; use another one (best.ckpt)" in error
    assert Path("run/metrics.csv").read_text() == before
    assert read_checkpoint(Path("run/checkpoints/best.ckpt"))["global_step"] == 6


def test_a_run_that_was_moved_still_knows_its_best_validation(arguments: list[str]) -> None:
    first = main(["fit", *arguments, "--trainer.max_steps=6"]).trainer.checkpoint_callbacks
    Path("run").rename("moved")
    second = main(["fit", *arguments, "--trainer.max_steps=6", "--run_dir=moved", "--ckpt_path=last"])
    (before,), (after,) = (
        [callback for callback in callbacks if isinstance(callback, BestCheckpoint)]
        for callbacks in (first, second.trainer.checkpoint_callbacks)
    )
    assert before.best_score is not None
    assert after.best_score == before.best_score


def test_run_that_goes_on_from_an_earlier_checkpoint_keeps_its_own(arguments: list[str]) -> None:
    main(["fit", *arguments, "--trainer.max_steps=9", "--checkpoint.keep=-1"])
    main(["fit", *arguments, "--trainer.max_steps=6", "--ckpt_path=run/checkpoints/step-000003.ckpt"])
    assert read_checkpoint(Path("run/checkpoints/last.ckpt"))["global_step"] == 6
    assert [path.name for path in Path("run/checkpoints").glob("step-*.ckpt")] == ["step-000006.ckpt"]


def test_loss_that_is_not_finite_stops_the_run_and_says_where(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm.training.module import LanguageModel

    step_loss = LanguageModel.step_loss

    def spoiled(self, index, count, loss):
        return step_loss(self, index, count, loss * (float("nan") if self.trainer.global_step == 10 else 1))

    monkeypatch.setattr(LanguageModel, "step_loss", spoiled)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and "\n" not in error
    assert "loss of step 11 is nan" in error
    assert "batch 2 of epoch 1 (samples" in error  # of 8 batches an epoch
    assert "step-000009.ckpt" in error
    weights = read_checkpoint(Path("run/checkpoints/last.ckpt"))["state_dict"].values()
    assert all(weight.isfinite().all() for weight in weights)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm.training.module import LanguageModel

    after = LanguageModel.on_train_batch_end

    def spoiled(self, *args):
        after(self, *args)
        if self.trainer.global_step == 9:
            torch.nn.init.constant_(next(self.parameters()), float("inf"))

    monkeypatch.setattr(LanguageModel, "on_train_batch_end", spoiled)
    with pytest.raises(SystemExit):
        main(["fit", *arguments])
    error = capsys.readouterr().err
    assert "after step 9 the weights are not finite" in error and "step-000006.ckpt" in error
    assert read_checkpoint(Path("run/checkpoints/last.ckpt"))["global_step"] == 6
