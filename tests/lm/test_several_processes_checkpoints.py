"""A checkpoint that several processes write is as good as a file: whole, checked, read by one process as by many."""

import os
import pickle
import shutil
from pathlib import Path

import pytest

from lm.__main__ import main
from tests.lm.test_several_processes import FSDP
from tests.processes import Commands
from tests.runs import TINY, rows, torchrun, write_stories

ALONE = ["--trainer.devices=1", "--trainer.strategy=auto"]


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


def test_sharded_checkpoint_is_used_by_one_process_and_refused_when_damaged(
    in_tmp: Path, commands: Commands, capsys: pytest.CaptureFixture
) -> None:
    stories = write_stories(in_tmp / "stories")
    same = [f"--data.path={stories}", *TINY, "--model.decoder.dropout=0", "--model.optimizer.schedule=constant",
            "--trainer.val_check_interval=2", "--checkpoint.every_n_steps=2", "--samples.every_n_steps=0",
            "--trainer.precision=32-true"]  # fmt: skip
    both = ["fit", *FSDP, *same, "--data.batch_size=2", "--run_dir=two"]
    for process in commands.together(torchrun(), *both, "--trainer.max_steps=4"):
        assert process.wait() == 0, process.output
    checkpoints = Path("two/checkpoints")
    assert {path.name for path in checkpoints.iterdir()} == {
        "last.ckpt", "best.ckpt", "step-000004.ckpt", os.readlink(checkpoints / "best.ckpt"),
    }  # fmt: skip

    run = ["--config=two/config.yaml", *ALONE]
    metrics = main(["validate", *run, "--ckpt_path=last"]).trainer.callback_metrics
    assert float(metrics["val/loss"]) == pytest.approx(float(rows(Path("two"))[-1]["val/loss"]), abs=1e-6)
    main(["predict", *run, "--ckpt_path=best", '--data.prompts=["Tom"]'])
    assert Path("two/predictions.jsonl").exists()

    # One process goes on as it would have from a file of its own.
    shutil.copytree("two", "one", symlinks=True)
    main(["fit", *run, "--run_dir=one", "--ckpt_path=last", "--trainer.max_steps=6", "--data.batch_size=4"])
    main(["fit", *same, "--run_dir=whole", "--trainer.max_steps=6", "--data.batch_size=4"])
    for left, right in zip(rows(Path("one")), rows(Path("whole")), strict=True):
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=1e-5)

    capsys.readouterr()
    last = checkpoints / "step-000004.ckpt"
    metadata = (last / ".metadata").read_bytes()
    for name, content in (
        (".metadata", pickle.dumps(Harmful())),
        ("__1_0.distcp", (last / "__1_0.distcp").read_bytes()[:-1]),
        ("checksums.json", b"{"),
    ):
        whole = (last / name).read_bytes()
        (last / name).write_bytes(content)
        with pytest.raises(SystemExit) as ending:
            main(["validate", *run, "--ckpt_path=last"])
        (last / name).write_bytes(whole)
        error = capsys.readouterr().err.strip()
        assert ending.value.code == 2 and error.startswith("error: ") and "\n" not in error, name
    assert not Path("harmed").exists()
    assert (last / ".metadata").read_bytes() == metadata


def test_description_of_the_shares_runs_no_code(in_tmp: Path) -> None:
    from experiment.runs.sharding import read

    Path(".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(pickle.UnpicklingError):
        read(Path(), "outline")
    assert not Path("harmed").exists()
