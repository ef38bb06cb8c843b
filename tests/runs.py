"""A very small run of the language model, and what must not differ between two runs."""

import contextlib
import csv
import json
import random
import signal
import socket
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.processes import Commands

STORIES = [
    f"Once upon a time, {name} had a {thing}. {name} was {mood}. The end."
    for name in ("Tom", "Anna", "Ben")
    for thing in ("red ball", "big dog", "blue hat", "small boat")
    for mood in ("happy", "very sad", "kind")
]
STEPS = 26
TIMES = {f"train/{name}" for name in ("tokens_per_second", "step_seconds", "data_seconds", "peak_memory_gib", "mfu")}
TINY = [
    "--data.vocab_size=345", "--data.sequence_length=16", "--data.batch_size=4",
    "--model.decoder.hidden_size=16", "--model.decoder.intermediate_size=24", "--model.decoder.num_layers=1",
    "--model.decoder.num_heads=2", "--model.decoder.max_sequence_length=32", "--model.decoder.dropout=0.2",
    "--model.optimizer.schedule=cosine", "--trainer.accelerator=cpu", f"--trainer.max_steps={STEPS}",
    "--trainer.max_epochs=-1", "--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=null",
    "--trainer.log_every_n_steps=1", "--checkpoint.every_n_steps=3", "--samples.every_n_steps=4",
    "--samples.max_new_tokens=3", "--report=false",
]  # fmt: skip


def write_stories(folder: Path, validation: int = 6) -> Path:
    """A folder with 29 stories to train on, and some for validation."""
    folder.mkdir(exist_ok=True)
    for split, texts in {"train": STORIES[:29], "validation": STORIES[29:][:validation]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def rows(run: Path) -> list[dict[str, str]]:
    if not (run / "metrics.csv").exists():
        return []
    with (run / "metrics.csv").open() as stream:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(stream)]


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_run(run: Path, expected: Path, steps: int = STEPS) -> None:
    """Every logged figure, every sample and verdict, all weights and the optimizer's state are equal to the bit."""
    assert [row["step"] for row in rows(run)] == [str(step) for step in range(1, steps + 1)]
    assert rows(run) == rows(expected)
    for file in expected.glob("*.jsonl"):
        assert (run / file.name).read_text() == file.read_text()
    left, right = checkpoint(run), checkpoint(expected)
    assert left["state_dict"].keys() == right["state_dict"].keys()
    assert all(torch.equal(left["state_dict"][name], right["state_dict"][name]) for name in left["state_dict"])
    moments = [
        [value for state in content["optimizer_states"][0]["state"].values() for value in state.values()]
        for content in (left, right)
    ]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))


def refused(capsys: pytest.CaptureFixture, *args: str, package: str = "lm") -> str:
    """The one line on stderr with which a command ends that is given bad input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        import_module(f"{package}.__main__").main(list(args))
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and error.startswith("error: ") and "\n" not in error
    return error


def newest_step(run: Path) -> int:
    try:
        return int(rows(run)[-1]["step"])
    except (IndexError, KeyError, TypeError, ValueError):  # no row yet, or half of one
        return 0


def kill_and_resume(
    commands: Commands, arguments: list[str], steps: int, seed: int, package: str = "lm", most: int = 3
) -> None:
    """Begin the run in the folder ``run``, kill and resume it up to so often at random moments, and let it end."""
    run, dice, kills = Path("run"), random.Random(seed), 0
    while kills < most and newest_step(run) < steps - 2:
        target, delay = newest_step(run) + dice.randint(-1, 6), dice.uniform(0, 0.1)
        process = commands.start("fit", *arguments, "--ckpt_path=last", package=package)
        process.wait(until=lambda target=target: newest_step(run) >= target)
        time.sleep(delay)
        process.send(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    commands.run("fit", *arguments, "--ckpt_path=last", package=package)


def free_port() -> int:
    """Below the ports that the system hands out for connections, of which another may take one before it is used."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def torchrun(processes: int = 2) -> list[dict[str, str]]:
    """What torchrun sets for so many processes."""
    size = str(processes)
    shared = {
        "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
