"""A classifier that is killed and resumed is, to the bit, the one that never was; two processes are one."""

import re
from pathlib import Path

import pytest

from classify.__main__ import main
from experiment.pages.predictions import read_verdicts
from tests.processes import Commands
from tests.runs import assert_same_run, kill_and_resume, rows, torchrun

ROOT = Path(__file__).parents[2]
STEPS = 18  # three epochs of six batches
FLAGS = [
    "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--checkpoint.every_n_steps=4", "--report=false",
]  # fmt: skip


@pytest.mark.parametrize("adapter", ["custom", "peft", "full"])
def test_killed_run_resumes_to_the_same_losses_and_weights(
    adapter: str, small_run: list[str], commands: Commands, in_tmp: Path, repeat: int
) -> None:
    Path("configs").symlink_to(ROOT / "configs")
    # best.yaml keeps the moving average of the weights
    averaged = ["--config=configs/classify/best.yaml"] if adapter == "full" else []
    arguments = [*averaged, *small_run, *FLAGS, f"--model.adapter={adapter}"]
    commands.run("fit", *arguments, "--run_dir=whole", package="classify")
    most = 3 if adapter == "custom" else 1
    kill_and_resume(commands, [*arguments, "--run_dir=run"], STEPS, seed=repeat, package="classify", most=most)
    assert_same_run(Path("run"), Path("whole"), STEPS)


def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(
    small_run: list[str], commands: Commands, in_tmp: Path
) -> None:
    same = [
        *small_run, *FLAGS, "--model.lora_dropout=0", "--model.hidden_dropout=0", "--model.attention_dropout=0",
        "--data.validation_size=5", "--data.eval_batch_size=2", "--trainer.precision=32-true",
    ]  # fmt: skip
    both = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=4", "--run_dir=two"]
    for process in commands.together(torchrun(), "fit", *same, *both, package="classify"):
        assert process.wait() == 0, process.output
    commands.run("fit", *same, "--data.batch_size=8", "--run_dir=one", package="classify")
    alone, together = rows(Path("one")), rows(Path("two"))
    assert len(alone) == len(together) == STEPS
    for left, right in zip(alone, together, strict=True):
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=1e-5)
        if left["val/loss"]:
            assert float(left["val/loss"]) == pytest.approx(float(right["val/loss"]), abs=1e-6)
            assert left["val/accuracy"] == right["val/accuracy"]
    one, two = read_verdicts(Path("one")), read_verdicts(Path("two"))
    assert one.texts == two.texts and len(set(two.texts)) == 5
    assert two.probabilities == pytest.approx(one.probabilities, abs=1e-5)


def test_accumulation_follows_from_the_global_batch(small_run: list[str], in_tmp: Path, capsys) -> None:
    flags = ["--data.batch_size=4", "--data.global_batch_size=8", "--trainer.max_steps=1", "--report=false"]
    main(["fit", *small_run, *flags])
    said = capsys.readouterr().out
    assert "each step trains 4 reviews x 2 micro-batches = 8" in said
    assert re.search(r"\d+ reviews to train on, \d+ to validate on; classes: negative, positive\n", said)
