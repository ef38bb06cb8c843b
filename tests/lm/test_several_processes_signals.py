"""Whoever is told to end ends, with all that were started together, also where one waits for another in vain."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.lm.test_several_processes import DDP
from tests.processes import Commands
from tests.runs import TINY, newest_step, torchrun, write_stories


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return ["fit", *DDP, f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--run_dir=run"]


def test_the_second_signal_ends_a_process_that_waits_for_another(arguments: list[str], commands: Commands) -> None:
    first, second = [commands.start(*arguments, "--trainer.max_steps=2000", env=env) for env in torchrun()]
    first.wait(until=lambda: newest_step(Path("run")) >= 3)
    second.send(signal.SIGSTOP)
    time.sleep(0.5)  # until the first waits in a collective
    first.send(signal.SIGTERM)
    time.sleep(0.5)
    assert first.poll() is None
    first.send(signal.SIGTERM)
    assert first.wait(seconds=5) == 128 + signal.SIGTERM
    second.send(signal.SIGKILL)
    second.wait()


def test_a_wait_has_an_end_and_says_who_waited_where(arguments: list[str], commands: Commands) -> None:
    both = [*arguments, "--trainer.max_steps=2000", "--trainer.strategy.init_args.timeout=0:00:04"]
    first, second = [commands.start(*both, env=env) for env in torchrun()]
    first.wait(until=lambda: newest_step(Path("run")) >= 3)
    second.send(signal.SIGSTOP)
    assert first.wait(seconds=30) == 1
    last = first.output.strip().splitlines()[-1]
    assert last.startswith("error: process 0 of 2 timed out waiting for another process in "), first.output
    assert "__main__.py" not in last  # where it waits, not where it began
    second.send(signal.SIGKILL)
    second.wait()


def test_nothing_is_left_ten_seconds_after_sigterm(arguments: list[str], commands: Commands, repeat: int) -> None:
    process = commands.start(*arguments, "--trainer.max_steps=2000")  # Lightning starts the second
    process.wait(until=lambda: "val/loss" in process.output or repeat % 2 == 0)
    time.sleep(random.Random(repeat).uniform(0, 1 if repeat % 2 else 4))
    process.send(signal.SIGTERM)
    assert process.wait(seconds=10) in (128 + signal.SIGTERM, -signal.SIGTERM), process.output
    end = time.monotonic() + 10
    while _lives(process.pid):
        assert time.monotonic() < end, process.output
        time.sleep(0.1)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
