"""Comparisons: no run twice, none lost, several processes at once, and figures over seeds."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from experiment.compare import runner as compare
from experiment.compare.comparison import Comparison, Run, choices, read_comparison
from experiment.compare.differences import collect, differences
from experiment.compare.differences import draw as draw_plot

ROOT = Path(__file__).parents[2]
# A training that writes what fit writes; its loss is rate + seed / 100. It can fail, and it can take a while.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
from filelock import FileLock
if __name__ == "__main__":
    given = dict(word[2:].split("=", 1) for word in sys.argv[2:])
    run = Path(given["run_dir"])
    lock = FileLock(run / ".lock")  # as fit holds it
    lock.acquire()
    with open("calls.txt", "a") as calls:
        calls.write(f"{os.getppid()} {given['rate']} {given['seed_everything']}\\n")
    run.mkdir(parents=True, exist_ok=True)
    (run / "begun").touch()
    time.sleep(float(given.get("takes", 0)))
    if Path("broken").exists() and given["rate"] == "2":
        sys.exit(3)
    (run / "group").write_text(os.environ["WANDB_RUN_GROUP"])
    loss = float(given["rate"]) + int(given["seed_everything"]) / 100
    (run / "metrics.csv").write_text(f"step,train/loss,val/loss\\n1,9,9\\n2,8,{loss}\\n")
    (run / "run.json").write_text(json.dumps({"calls": [{"seconds": 1.5}], "parameters": {"trainable": 7, "total": 7}}))
"""
# Each step trains 100 tokens, the first in 2 s and each other in half a second.
TIMED = """
import sys
from pathlib import Path
if __name__ == "__main__":
    given = dict(word[2:].split("=", 1) for word in sys.argv[2:])
    run, steps = Path(given["run_dir"]), int(given["trainer.max_steps"])
    run.mkdir(parents=True, exist_ok=True)
    rows = [f"{step},{100 * step},{50 if step == 1 else 200}," for step in range(1, steps)]
    rows += [f"{steps},{100 * steps},200,3"]
    (run / "metrics.csv").write_text("\\n".join(["step,train/tokens,train/tokens_per_second,val/loss", *rows, ""]))
"""
# Saves when it is told to stop, and notes how it would be told to go on.
SAVES = """
import os, signal, sys, time
from pathlib import Path
if __name__ == "__main__":
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    Path("begun").touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.3)
    Path("saved").write_text(" ".join(map(str, asked)))
    Path("told").write_text(os.environ["TINYLAB_RESUME"])
    sys.exit(128 + asked[0])
"""
CONTENT = {
    "package": "stand_in", "seeds": [1, 2], "metric": {"name": "val/loss", "goal": "minimize"},
    "report": ["val/loss", "trainable"], "baseline": "one",
    "rows": {"one": {"flags": {"rate": 1}}, "two": {"flags": {"rate": 2}, "shows": "More."}},
}  # fmt: skip


@pytest.fixture
def stand_in(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a stand-in for an experiment, and a comparison of it."""
    (in_tmp / "stand_in.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(in_tmp)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(in_tmp), str(ROOT))))
    return write_comparison()


def write_comparison(name: str = "rates", **changes: object) -> Path:
    file = Path(f"{name}.yaml")
    file.write_text(yaml.safe_dump(CONTENT | changes))
    return file


def run(*args: object) -> int:
    try:
        compare.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


def calls() -> list[str]:
    return [line.split(" ", 1)[1] for line in Path("calls.txt").read_text().splitlines()]


def table(name: str = "rates") -> list[dict[str, str]]:
    with Path(f"runs/comparisons/{name}/{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_each_run_is_made_once_and_its_figures_are_compared(stand_in: Path) -> None:
    assert run(stand_in) == 0
    assert calls() == ["1 1", "2 1", "1 2", "2 2"]  # all rows of a seed first
    assert run(stand_in, "--seeds", 1, 2, 1) == 0 and len(calls()) == 4  # each seed once
    one, two = table()
    assert (one["val/loss"], two["val/loss"]) == ("1.0150 ± 0.0071", "2.0150 ± 0.0071")
    assert (two["val/loss: difference from one"], two["seeds"], two["what it shows"]) == (
        "+1.0000 ± 0.0000",
        "1, 2",
        "More.",
    )
    folder = Path("runs/comparisons/rates")
    lines = [json.loads(line) for line in (folder / "rates.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"], line["seconds"]) for line in lines] == [
        ("one", 1, 1.5), ("two", 1, 1.5), ("one", 2, 1.5), ("two", 2, 1.5)
    ]  # fmt: skip
    assert (folder / "rates.md").read_text().startswith("| row | val/loss |")
    assert (folder / "rates.png").stat().st_size > 5_000

    runs = Path("runs/comparisons/runs")
    assert {file.read_text() for file in runs.glob("*/group")} == {"rates"} and "WANDB_RUN_GROUP" not in os.environ
    equal = write_comparison("other-0.5", rows={"same": {"flags": {"rate": "1.0e+0"}}}, baseline=None)
    assert run(equal) == 0 == run(stand_in, "--only", "two")
    assert len(calls()) == 4 and len(table("other-0.5")) == 1


def test_rows_of_equal_settings_share_their_runs_and_are_said_to(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(write_comparison(rows={"one": {"flags": {"rate": 1}}, "same": {"flags": {"rate": "1.0"}}})) == 0
    assert calls() == ["1 1", "1 2"] and [row["seeds"] for row in table()] == ["1, 2", "1, 2"]
    assert capsys.readouterr().out.count("One run for one, same: their settings are equal.") == 1


def test_runs_of_another_source_are_named(stand_in: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    recorded = STAND_IN.replace('"calls"', '"environment": {"source": Path("source").read_text()}, "calls"')
    Path("stand_in.py").write_text(recorded)
    monkeypatch.setattr("experiment.compare.differences.write_report", lambda *_: None)  # it wants more of a run
    said = []
    for source, now in (("abc", "abc"), ("abc", "def"), ("abc-dirty-1", "abc-dirty-2")):
        Path("source").write_text(source)
        monkeypatch.setattr("experiment.compare.differences.source_version", lambda now=now: now)
        assert run(stand_in, "--seeds", 1, "--out", source) == 0
        said.append("Made by the source" in capsys.readouterr().out)
    assert said == [False, True, True] and len(calls()) == 4


def test_results_of_other_machines_count(stand_in: Path) -> None:
    assert run(stand_in, "--seeds", 1, "--out", "there") == 0 == run(stand_in, "--seeds", 2)
    Path("there/results.jsonl").rename("runs/comparisons/results-there.jsonl")
    assert run(stand_in, "--seeds", 1, 2) == 0
    assert len(calls()) == 4 and [row["seeds"] for row in table()] == ["1, 2", "1, 2"]


def test_row_that_fails_is_shown_as_failed_and_tried_again_by_the_next_call(stand_in: Path) -> None:
    Path("broken").touch()
    assert run(stand_in) == 1
    assert len(calls()) == 4
    assert [row["seeds"] for row in table()] == ["1, 2", "1 failed (exit code 3), 2 failed (exit code 3)"]
    Path("broken").unlink()
    assert run(stand_in) == 0
    assert calls()[4:] == ["2 1", "2 2"] and [row["seeds"] for row in table()] == ["1, 2", "1, 2"]


def start(file: Path, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiment.compare", str(file), *map(str, args)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_share_the_runs_of_a_comparison(stand_in: Path) -> None:
    processes = [start(stand_in, "--seeds", *range(6), "--takes=0.2") for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert sorted(calls()) == sorted(f"{rate} {seed}" for rate in (1, 2) for seed in range(6))
    assert {line.split()[0] for line in Path("calls.txt").read_text().splitlines()} == {str(p.pid) for p in processes}


def test_run_that_outlives_its_killed_comparison_is_waited_for(stand_in: Path) -> None:
    process = start(stand_in, "--only", "one", "--seeds", 1, "--takes=2")
    wait_for(lambda: list(Path("runs").rglob("begun")))
    process.kill()
    process.wait()
    assert not list(Path("runs").rglob("metrics.csv"))
    begun = time.monotonic()
    assert run(stand_in, "--only", "one", "--seeds", 1, "--takes=2") == 0
    assert time.monotonic() - begun > 2  # the second began once the first had ended
    assert calls() == ["1 1", "1 1"]


def test_comparison_that_is_stopped_lets_its_run_save(stand_in: Path) -> None:
    Path("stand_in.py").write_text(SAVES)
    for number, whole_group in ((signal.SIGINT, True), (signal.SIGTERM, False)):  # as a terminal does, as kill does
        process = start(stand_in)
        wait_for(Path("begun").exists)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        assert process.wait(timeout=30) == 128 + number
        assert Path("saved").read_text() == str(int(number))  # asked once
        assert Path("told").read_text().endswith(f"tinylab compare {stand_in}")  # by the run, and only by it
        assert process.stdout.read().count("go on") == 0
        Path("saved").unlink(), Path("begun").unlink()


def test_budget_of_seconds_is_as_many_steps_as_it_takes_once_a_step_is_timed(stand_in: Path) -> None:
    Path("stand_in.py").write_text(TIMED)
    file = write_comparison(rows={"one": {}}, seeds=[1, 2], report=["val/loss", "tokens", "training_seconds"])
    assert run(file, "--budget", "seconds=30", "points=4") == 0
    lines = list(compare.read_results(Path("runs/comparisons")).values())
    assert [line["seconds_per_step"] for line in lines] == [0.5] * 3  # of one run that times, and two that train
    assert [line["curve"]["tokens"] for line in lines[1:]] == [[6000.0]] * 2  # 60 steps
    assert lines[1]["curve"]["training_seconds"] == [2 + 59 * 0.5]
    flags = lines[1]["arguments"]
    assert {"--trainer.max_steps=60", "--trainer.val_check_interval=15", "--checkpoint.every_n_steps=15"} <= {*flags}
    assert run(file, "--budget", "seconds=30", "points=4", "--seeds", 1, 2, 3) == 0
    assert run(file, "--budget", "seconds=0.1") == 2
    assert len(compare.read_results(Path("runs/comparisons"))) == 4  # what was timed is known


def test_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('\n{"key": "a", "loss": 1}\n{"key": "b", "curve": {"x": [1]}\n{"key": "c"}')
    assert compare.read_results(tmp_path) == {"a": {"key": "a", "loss": 1}, "c": {"key": "c"}}


# ------------------------------------------------------------------------------------------------------- the files


def test_grid_keeps_the_kind_of_each_value(stand_in: Path) -> None:
    values = [None, True, False, 1, 1.5, "text", [1, "a"], {"a": None}]
    file = write_comparison(
        rows={"one": {}}, parameters={"model.rate": {"values": values}, "data.seed": {"value": 7}}, baseline=None
    )
    runs = read_comparison([str(file)])[0].rows
    words = [next(word for word in run.arguments if word.startswith("--model.rate=")) for run in runs]
    assert [yaml.safe_load(word.partition("=")[2]) for word in words] == values
    assert words[0] == "--model.rate=null" and runs[0].config == {"model": {"rate": None}, "data": {"seed": 7}}
    assert runs[0].name == "one,rate=null"


def test_draws_lie_in_their_range_and_are_the_same_whenever_the_file_is_read(stand_in: Path) -> None:
    parameters = {
        "rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "model.layers": {"min": 2, "max": 4}, "model.drop": {"min": 0.0, "max": 0.5},
        "model.kind": {"values": ["a", None]},
    }  # fmt: skip
    file = write_comparison(method="random", run_cap=30, parameters=parameters, rows={"": {}}, baseline=None)
    drawn = [row.flags for row in read_comparison([str(file)])[0].rows]
    assert drawn == [row.flags for row in read_comparison([str(file)])[0].rows] and len(drawn) == 30
    assert {flags["model.layers"] for flags in drawn} == {2, 3, 4} and {flags["model.kind"] for flags in drawn} == {
        "a",
        None,
    }
    assert all(1e-4 <= flags["rate"] <= 1e-1 and 0 <= flags["model.drop"] <= 0.5 for flags in drawn)
    dice = random.Random(1)
    small = sum(
        choices("rate", parameters["rate"], dice)[0] < 10**-2.5 for _ in range(400)
    )  # the middle of the logarithms
    assert 160 < small < 240


def test_flags_of_a_row_win_over_the_command_line_and_these_over_files(stand_in: Path) -> None:
    Path("base.yaml").write_text("model: {rate: 1, r: 8, alpha: 16}\ndata: {path: here}")
    rows = {"one": {}, "plain": {"flags": {"model.r": 2}}}
    file = write_comparison(configs=["base.yaml"], rows=rows, flags={"model.rate": 2, "data.path": "there"})
    one, plain = read_comparison([str(file), "--model.r", "4", "--data.path=elsewhere"])[0].rows
    assert one.config == {"model": {"rate": 2, "r": 4, "alpha": 16}, "data": {"path": "elsewhere"}}
    assert plain.config["model"]["r"] == 2 and "--model.r=2" in plain.arguments
    assert one.key != plain.key


@pytest.mark.parametrize(
    ("changes", "args", "words"),
    [
        ({"rows": {"one": {"flgs": {}}}}, [], "row one: flgs: there is no such key (did you mean flags?); expected "),
        ({"row": {}}, [], "row: there is no such key (did you mean rows?); expected "),
        ({"rows": ["one"]}, [], "rows ['one']: expected a mapping"),
        ({"rows": {"one": 1}}, [], "row one: 1: expected a mapping"),
        ({"rows": {"one": {"configs": "a.yaml"}}}, [], "row one: configs a.yaml: expected a list of texts"),
        ({"baseline": "ones"}, [], "baseline ones: there is no such row (did you mean one?); expected one or two"),
        ({"metric": None}, [], "metric: not given"),
        ({"metric": "val/loss"}, [], "metric val/loss: expected a mapping"),
        ({"metric": {"goal": "minimize"}}, [], "metric: name: not given"),
        ({"metric": {"name": "val/loss", "goal": "min"}}, [], "metric: goal min: expected minimize or maximize"),
        ({"report": ["los"]}, [], "los: there is no such metric; expected train/loss, parameters"),
        ({"report": ["tokns"]}, [], "tokns: there is no such metric (did you mean tokens?)"),
        ({"package": "lm", "metric": {"name": "val/bits_per_bite"}}, [], "(did you mean val/bits_per_byte?)"),
        ({"seeds": 1}, [], "seeds 1: expected a list"),
        ({"seeds": ["a"]}, [], "seeds ['a']: expected a list of whole numbers"),
        ({"seeds": []}, [], "seeds: not given"),
        ({"report": "val/loss"}, [], "report val/loss: expected a list"),
        ({"at": "first"}, [], "at first: expected last or best"),
        ({"quoted": {"theirs": 0.5}}, [], "quoted {'theirs': 0.5}: expected a mapping of mappings"),
        ({"trainer": {}, "model": {}}, [], "this is a configuration of fit"),
        ({"method": "bayes"}, [], "method bayes: expected grid or random"),
        ({"parameters": {"rate": {"min": 0}}}, [], "parameter rate"),
        ({"parameters": {"rate": 3}}, [], "parameter rate 3: expected value, a list of values"),
        ({"parameters": {"rate": {"values": 3}}}, [], "parameter rate {'values': 3}: expected value, a list of values"),
        ({"parameters": {"rate": {"values": []}}}, [], "parameter rate {'values': []}: expected value, a list"),
        ({"method": "random", "parameters": {"rate": {"min": "a", "max": 1}}}, [], "'min': 'a'}: expected value"),
        ({"method": "random", "parameters": {"rate": {"min": 4, "max": 2}}}, [], "'min': 4}: expected value"),
        (
            {"method": "random", "parameters": {"r": {"distribution": "log_uniform_values", "min": 0, "max": 1.0}}},
            [],
            "parameter r {'distribution'",
        ),
        ({"command": 5}, [], "command 5: expected -m"),
        ({"flags": {1: 2}}, [], "flags {1: 2}: expected a mapping"),
        ({"budget": {"step": 1}}, [], "budget: step: there is no such key (did you mean steps?); expected steps"),
        ({"budget": {"steps": 1, "tokens": 1}}, [], "budget {'steps': 1, 'tokens': 1}: expected one of steps"),
        ({"budget": {"steps": 0}}, [], "budget {'steps': 0}: expected one of steps"),
        ({"budget": {"steps": 9, "points": 0}}, [], "budget {'points': 0, 'steps': 9}: expected one of steps"),
        ({"budget": {"points": 4}}, [], "budget {'points': 4}: expected one of steps"),
        ({"rows": {"one": {"flags": {"run_dir": "x"}}}}, [], "--run_dir is set for each run"),
        ({"rows": {"one": {"flags": {"run_dir": "x"}}}}, ["--budget", "steps=2"], "--run_dir is set for each run"),
        ({"budget": {"steps": 9}, "flags": {"trainer.max_steps": 5}}, [], "--trainer.max_steps is set for each run"),
        ({"package": "lm", "metric": {"name": "val/accuracy"}}, [], "val/accuracy: there is no such metric; expected"),
        ({"configs": ["nowhere.yaml"]}, [], "config nowhere.yaml does not exist"),
        ({"command": ["python"]}, [], "command python: expected -m"),
        ({"package": "nowhere"}, [], "row one: package nowhere: expected lm or classify"),
        ({"package": None}, [], "row one: package: not given"),
        ({}, ["--only", "three"], "--only three: there is no such row; expected one or two"),
        ({"baseline": None}, ["--only", "three"], "--only three: there is no such row; expected one or two"),
        ({}, ["--run_dir", "x"], "--run_dir is set for each run"),
        ({}, ["--seeds", "x"], "--seeds x: expected a whole number"),
        ({}, ["--budget", "tokens=many"], "row one: budget: tokens many: expected a number"),
        ({}, ["--budget", "tokens"], "row one: budget: tokens : expected a number"),
        ({}, ["x"], "x: expected a flag of fit"),
        ({}, ["--budget", "tokens=10"], "10 tokens cannot be counted in advance for one"),
        ({}, ["--budget", "steps=5", "--trainer.max_steps=9"], "--trainer.max_steps is set for each run"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line_and_runs_nothing(
    stand_in: Path, changes: dict, args: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert run(write_comparison(**changes), *args) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not Path("calls.txt").exists() and not Path("runs").exists()


def test_figure_that_no_run_has_is_named_after_the_tables(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(write_comparison(report=["val/loss", "val/applause"])) == 2
    assert capsys.readouterr().err.startswith("error: val/applause: no run has this metric")
    assert run(write_comparison()) == 0 and len(calls()) == 4  # nothing is lost


def test_rows_of_the_command_line_are_named_by_their_files_and_by_their_paths_where_these_agree(in_tmp: Path) -> None:
    file = write_comparison(package="lm")
    for path, rate in (("a.yaml", 1), ("b.yaml", 2), ("x/a.yaml", 3)):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(f"model: {{rate: {rate}}}")
    names = lambda *rows: [row.name for row in read_comparison([str(file), "--rows", *rows])[0].rows]  # noqa: E731
    assert names("a.yaml", "a.yaml,b.yaml") == ["a", "a+b"] and names("a.yaml", "x/a.yaml") == ["a.yaml", "x/a.yaml"]


def test_row_that_stands_twice_is_refused(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    Path("twice.yaml").write_text("rows:\n  one: {}\n  one: {flags: {model.r: 2}}\n")
    assert run(Path("twice.yaml")) == 2
    assert capsys.readouterr().err == "error: config twice.yaml: one is given twice, in lines 2 and 3: merge the two\n"


def test_difference_is_paired_over_seeds_and_says_what_may_be_chance() -> None:
    theirs = {1: 0.90, 2: 0.95, 3: 1.00, 9: 5.0}
    clear = {1: 0.80, 2: 0.86, 3: 0.89}  # each seed gains as much, although the seeds lie apart
    noisy = {1: 0.80, 2: 1.00, 3: 0.98}

    def difference(ours: dict[int, float]) -> str:
        runs = [(row, *run) for row, values in (("ours", ours), ("theirs", theirs)) for run in values.items()]
        return differences(pd.DataFrame(runs, columns=["row", "seed", "loss"]), "loss", "theirs")["ours"]

    for ours in (clear, noisy):
        pairs = [ours[seed] - theirs[seed] for seed in (1, 2, 3)]
        p_value = ttest_rel([ours[s] for s in (1, 2, 3)], [theirs[s] for s in (1, 2, 3)]).pvalue
        expected = f"{mean(pairs):+.4f} ± {stdev(pairs) / 3**0.5:.4f}" + (
            ", within the noise" if p_value > 0.05 else ""
        )
        assert difference(ours) == expected
    assert difference({1: 0.5}) == "-0.4000, one seed" and difference({4: 0.5}) == ""


def test_line_through_loss_and_compute_is_that_of_a_power_law(tmp_path: Path) -> None:
    comparison = Comparison(
        name="scaling", metric={"name": "val/loss", "goal": "minimize"}, report=["val/loss", "compute"], plot="compute",
        rows=[Run(f"d{n}", 1, "lm", group="equal tokens") for n in range(1, 5)],
    )  # fmt: skip
    lines = []
    for n in range(1, 5):  # the loss is 40 (6 N D)^-0.125
        curve = {"tokens": [n * 1e5], "val/loss": [40 * (6 * 1e4 * n * n * 1e5) ** -0.125]}
        lines.append({"row": f"d{n}", "seed": 1, "parameters": n * 1e4, "curve": curve})
    panels = []
    with pytest.MonkeyPatch.context() as patch:
        subplots = Figure.subplots
        patch.setattr(Figure, "subplots", lambda self, *a, **k: panels.append(subplots(self, *a, **k)) or panels[-1])
        draw_plot(comparison, collect(comparison, lines), tmp_path / "plot.png")
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["equal tokens: C^-0.125"]
