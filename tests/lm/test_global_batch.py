"""What an optimizer step trains is said once, and all intervals count such steps."""

from pathlib import Path

import pytest

from lm.__main__ import main
from tests.runs import TINY, rows, write_stories


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return ["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--samples.every_n_steps=0"]


def test_accumulation_follows_from_the_global_batch(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    whole = [*arguments, "--model.decoder.dropout=0", "--trainer.max_steps=9", "--trainer.precision=32-true"]
    main([*whole, "--data.batch_size=8", "--run_dir=whole"])
    capsys.readouterr()
    main([*whole, "--data.batch_size=2", "--data.global_batch_tokens=128", "--run_dir=parts"])
    assert "each step trains 2 sequences x 16 tokens x 4 micro-batches = 128" in capsys.readouterr().out
    # Over two epochs, each of which ends with a step of fewer stories.
    left, right = rows(Path("whole")), rows(Path("parts"))
    assert [row["train/tokens"] for row in left] == [row["train/tokens"] for row in right]
    for one, other in zip(left, right, strict=True):
        assert float(one["train/loss"]) == pytest.approx(float(other["train/loss"]), abs=1e-5)
    # The run's own configuration says it too.
    assert "global_batch_tokens: 128" in Path("parts/config.yaml").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--data.global_batch_tokens=100"],
            "at once (4 sequences x 16 tokens = 64): expected 64 or 128",
        ),
        (["--data.global_batch_tokens=0"], "expected 64"),
        (["--data.global_batch_tokens=128", "--trainer.accumulate_grad_batches=3"], "makes it 2"),
    ],
)
def test_global_batch_that_cannot_be_is_refused(
    flags: list[str], words: str, arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ending:
        main([*arguments, *flags])
    error = capsys.readouterr().err.strip()
    assert ending.value.code == 2
    assert words in error
    assert "\n" not in error


@pytest.mark.parametrize("whole_run", [True, False])
def test_validation_interval_counts_optimizer_steps_with_accumulation(whole_run: bool, arguments: list[str]) -> None:
    flags = ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=2", "--trainer.max_steps=7"]
    main([*arguments, *flags, f"--trainer.check_val_every_n_epoch={'null' if whole_run else 1}", "--run_dir=run"])
    validated = [int(row["step"]) for row in rows(Path("run")) if row["val/loss"]]
    # Eight batches an epoch make three steps; an interval within epochs begins anew with each.
    assert validated == ([2, 4, 6, 7] if whole_run else [2, 5, 7])
