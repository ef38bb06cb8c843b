"""However many batches and processes: each story is evaluated once, and no process waits for another for ever."""

import json
from pathlib import Path

import pytest

from lm.__main__ import main
from tests.lm.test_several_processes import DDP, FSDP
from tests.processes import Commands
from tests.runs import TINY, torchrun, write_stories

CELLS = {2: [1, 3], 3: [2]}  # processes, and validation batches; all of them with --thorough


def test_validation_equals_that_of_one_process_whatever_the_number_of_batches(
    in_tmp: Path, commands: Commands, request: pytest.FixtureRequest
) -> None:
    whole = request.config.getoption("thorough")
    for processes, counts in CELLS.items():
        cells, expected = [], []
        for count in range(1, 9) if whole else counts:
            stories = write_stories(Path(f"stories-{count}"), count)
            same = [
                f"--data.path={stories.resolve()}",
                *TINY,
                "--data.eval_batch_size=1",
                "--data.evaluation=first_window",
            ]
            same.append("--trainer.precision=32-true")
            metrics = main(["validate", *same, "--run_dir=one"]).trainer.callback_metrics
            for strategy in (DDP, FSDP):
                cells.append([*strategy, *same, f"--trainer.devices={processes}", "--run_dir=several"])
                expected.append({name: float(value) for name, value in metrics.items()})
        Path("cells.json").write_text(json.dumps(cells))
        started = [
            commands.start("cells.json", "results.json", env=env, package="tests.lm.evaluation_grid")
            for env in torchrun(processes)
        ]
        for process in started:
            assert process.wait(seconds=60 + 5 * len(cells)) == 0, process.output
        results = json.loads(Path("results.json").read_text())
        for cell, left, right in zip(cells, expected, results, strict=True):
            assert left == pytest.approx(right, abs=1e-6), cell
