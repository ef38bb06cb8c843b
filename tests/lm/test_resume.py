"""A run that is killed at any moment and resumed is, to the bit, the run that never was.

``pytest tests/lm/test_resume.py --repeats 20`` repeats the killing with other seeds.
"""

import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch

from lm.__main__ import main
from tests.processes import Commands
from tests.runs import STEPS, TINY, assert_same_run, checkpoint, kill_and_resume, newest_step, rows, write_stories

CASES = {
    "packed": ["--data.packing=true"],
    "streamed": ["--data.packing=true", "--data.streaming=true"],
    "unpacked-accumulated": ["--data.packing=false", "--trainer.accumulate_grad_batches=2"],
    "muon": [
        "--data.packing=true",
        "--data.extra_first_windows=true",
        "--model.optimizer.muon_learning_rate=0.02",
        "--model.decoder.query_key_norm=true",
        "--model.decoder.value_residual=true",
    ],
    # No batch of one row, which would be compiled apart.
    "compiled": ["--data.packing=true", "--model.compile=true", "--data.batch_size=3"],
}
STOPPED = list(CASES)[:3]  # Muon and compiled code change nothing about how a run stops


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(request: pytest.FixtureRequest, commands: Commands, tmp_path_factory) -> tuple[list[str], Path]:
    """The arguments of a run, and the folder in which it went through."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = [f"--data.path={write_stories(folder / 'stories')}", *TINY, *CASES[request.param]]
    process = commands.run("fit", *arguments, "--run_dir=run", folder=folder)
    assert "model.compile does not work here" not in process.output
    return arguments, folder / "run"


def test_killed_run_resumes_to_the_same_losses_and_weights(
    uninterrupted: tuple[list[str], Path], commands: Commands, in_tmp: Path, repeat: int
) -> None:
    arguments, expected = uninterrupted
    most = 1 if "--model.compile=true" in arguments else 3  # each start compiles
    kill_and_resume(commands, [*arguments, "--run_dir=run"], STEPS, seed=repeat, most=most)
    assert_same_run(Path("run"), expected)
    shutil.rmtree("run")


@pytest.mark.parametrize("uninterrupted", STOPPED, indirect=True)
def test_signal_finishes_the_step_saves_and_leaves(
    uninterrupted: tuple[list[str], Path], commands: Commands, in_tmp: Path
) -> None:
    arguments, expected = uninterrupted
    number = signal.SIGINT if "--data.packing=true" in arguments else signal.SIGTERM
    process = commands.start("fit", *arguments, "--run_dir=run", "--checkpoint.every_n_steps=1000")
    process.wait(until=lambda: newest_step(Path("run")) >= 7)
    process.send(number)
    assert process.wait() == 128 + number
    assert "again to stop immediately" in process.output
    assert process.output.strip().endswith("--checkpoint.every_n_steps=1000 --ckpt_path last")
    assert "Traceback" not in process.output
    assert checkpoint(Path("run"))["global_step"] == newest_step(Path("run")) >= 7
    commands.run("fit", *arguments, "--run_dir=run", "--ckpt_path=last")
    assert_same_run(Path("run"), expected)


def test_second_signal_ends_the_run_at_once(commands: Commands, in_tmp: Path) -> None:
    stories = write_stories(in_tmp / "stories")
    # Greedy samples that take as long as a large model's step.
    long = ["--samples.every_n_steps=1", "--samples.max_new_tokens=20000", "--samples.temperature=0",
            "--model.decoder.max_sequence_length=20000"]  # fmt: skip
    process = commands.start("fit", f"--data.path={stories}", *TINY, *long, "--run_dir=run")
    process.wait(until=Path("run/config.yaml").exists)
    time.sleep(1)
    for _ in range(2):
        process.send(signal.SIGINT)
        process.wait(until=lambda: "again to stop immediately" in process.output)
    assert process.wait() == 130
    assert "Traceback" not in process.output and "resume with" not in process.output
    assert not list(Path("run").rglob("*.partial"))


def test_line_that_a_kill_cut_short_is_dropped(commands: Commands, in_tmp: Path) -> None:
    stories = write_stories(in_tmp / "stories")
    arguments = ["fit", f"--data.path={stories}", *TINY, "--run_dir=run", "--ckpt_path=last"]
    commands.run(*arguments, "--trainer.max_steps=6")
    whole = {name: Path("run", name).read_bytes() for name in ("samples.jsonl", "metrics.csv")}
    Path("run/samples.jsonl").write_bytes(whole["samples.jsonl"] + b'{"step": 8, "prompt": "On')
    Path("run/metrics.csv").write_bytes(whole["metrics.csv"] + b"7,0.000")
    commands.run(*arguments, "--trainer.max_steps=7")
    assert Path("run/samples.jsonl").read_bytes() == whole["samples.jsonl"]
    assert [row["step"] for row in rows(Path("run"))] == [str(step) for step in range(1, 8)]


def test_a_resume_reads_its_checkpoint_whole_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--run_dir=run"]
    main([*arguments, "--trainer.max_steps=2"])
    checked, mapped = [], []
    test, load = zipfile.ZipFile.testzip, torch.load
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: checked.append(file.filename) or test(file))
    monkeypatch.setattr(
        torch, "load", lambda *args, mmap, **rest: mapped.append(mmap) or load(*args, mmap=mmap, **rest)
    )
    main([*arguments, "--trainer.max_steps=3", "--ckpt_path=last"])
    assert [Path(file).name for file in checked] == ["last.ckpt"]
    assert mapped
    assert all(mapped)  # into memory, of which only what is used is read
