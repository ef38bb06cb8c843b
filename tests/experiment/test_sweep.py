"""A sweep's grid, run without a server; the runs are stand-ins that write what fit writes."""

from pathlib import Path

import pytest
import yaml

from experiment.sweep import combinations, command_of, main, read_sweep, run_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))
# Writes a metrics.csv whose loss is (rate - 0.003)^2, and a run.json that says the run is finished.
STAND_IN = """
import json, sys
from pathlib import Path
given = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[1:])
run = Path(given["run_dir"])
run.mkdir(parents=True)
(run / "metrics.csv").write_text(f"step,val/loss\\n1,9\\n2,{(float(given['rate']) - 0.003) ** 2}\\n")
(run / "run.json").write_text(json.dumps({"calls": [{"to_step": 2}]}))
with open("calls.txt", "a") as calls:
    calls.write(given["rate"] + given["model.kind"] + "\\n")
"""


@pytest.fixture
def sweep(in_tmp: Path) -> Path:
    (in_tmp / "stand_in.py").write_text(STAND_IN)
    content = {
        "name": "rates",
        "method": "grid",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"rate": {"values": [0.001, 0.003]}, "model.kind": {"value": "a"}},
        "command": ["${env}", "${interpreter}", "stand_in.py", "${args}"],
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(content))
    return Path("sweep.yaml")


def test_sweep_runs_every_combination_once_and_finds_the_best(sweep: Path, capsys: pytest.CaptureFixture) -> None:
    results = run_sweep(sweep)
    assert [(run.as_posix(), value) for run, value in results] == [
        ("runs/sweeps/rates/rate=0.001", pytest.approx(4e-6)), ("runs/sweeps/rates/rate=0.003", 0.0),
    ]  # fmt: skip
    assert "best val/loss" in capsys.readouterr().out
    assert run_sweep(sweep) == results
    assert Path("calls.txt").read_text() == "0.001a\n0.003a\n"


def test_sweep_that_fails_says_so_and_goes_on_when_called_again(sweep: Path, capsys: pytest.CaptureFixture) -> None:
    Path("stand_in.py").rename("away.py")
    with pytest.raises(SystemExit) as exit_:
        main([str(sweep)])
    assert exit_.value.code == 2
    assert "rate=0.001 ended with exit code" in capsys.readouterr().err.splitlines()[-1]
    Path("away.py").rename("stand_in.py")
    assert len(run_sweep(sweep)) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "bayes"}, "expected grid"),
        ({"metric": {"name": "val/loss"}}, "goal None"),
        ({"parameters": {"rate": {"min": 0}}}, "parameter rate has no values"),
        ({"command": ["python"]}, "no ${args}"),
    ],
)
def test_sweep_that_is_no_grid_is_refused(sweep: Path, change: dict, words: str, capsys: pytest.CaptureFixture) -> None:
    sweep.write_text(yaml.safe_dump(yaml.safe_load(sweep.read_text()) | change))
    with pytest.raises(SystemExit) as exit_:
        main([str(sweep)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and words in error and error.count("\n") == 1


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_parameters_of_every_sweep_are_options_of_its_command(file: Path, capsys: pytest.CaptureFixture) -> None:
    content = read_sweep(file)
    command = command_of(content, combinations(content["parameters"])[0], Path("run"), ["--print_config"])
    module = command[command.index("-m") + 1]
    entry = __import__(f"{module}.__main__", fromlist=["main"]).main
    with pytest.raises(SystemExit) as exit_:
        entry(command[command.index("fit") :])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert exit_.value.code == 0
    for name, value in combinations(content["parameters"])[0].items():
        found = printed
        for key in name.split("."):
            found = found[key]
        assert found == value
