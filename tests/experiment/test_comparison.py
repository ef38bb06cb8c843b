"""What all comparisons share: runs as processes that can be stopped, and figures over seeds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from experiment.comparison import cells, read_results

ROOT = Path(__file__).parents[2]
# Saves when it is told to stop; told twice, it ends at once, as fit does.
STAND_IN = """
import os, signal, sys, time
asked = []
def stop(number, frame):
    asked.append(number) or len(asked) > 1 and os._exit(1)
signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
print("training", flush=True)
while not asked:
    time.sleep(0.01)
time.sleep(0.3)
open("saved", "w").write(signal.Signals(asked[0]).name)
sys.exit(130)
"""
COMPARISON = """
from pathlib import Path
from experiment.comparison import command_line, fit
with command_line():
    fit("stand_in", [], Path("out/runs/one"))
"""


def test_comparison_that_is_stopped_lets_its_run_save(in_tmp: Path) -> None:
    Path("stand_in.py").write_text(STAND_IN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        command = [sys.executable, "-c", COMPARISON]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        assert process.stdout.readline() == "training\n"
        if number == signal.SIGINT:  # as a terminal does, to all of its processes
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(timeout=20) == code
        process.stdout.close()
        assert Path("saved").read_text() == number.name


def test_comparison_stops_with_its_run_where_the_run_alone_is_asked_to(in_tmp: Path) -> None:
    Path("stand_in.py").write_text(STAND_IN)
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", COMPARISON]  # as nohup … & does
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout.readline() == "training\n"
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "go on with the same command" in output
    assert Path("saved").read_text() == "SIGINT"


def test_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('\n{"key": "a", "loss": 1}\n{"key": "b", "curve": {"x": [1]}\n{"key": "c"}')
    assert read_results(tmp_path) == {"a": {"key": "a", "loss": 1}, "c": {"key": "c"}}


def test_cells_give_mean_and_standard_deviation_where_seeds_differ() -> None:
    lines = [{"loss": 0.88, "size": 7, "time": None}, {"loss": 0.92, "size": 7, "time": 3.0}]
    columns = {"loss": ("loss", ".2f"), "size": ("size", "d"), "time": ("time", ".0f"), "other": ("other", ".0f")}
    assert cells(lines, columns) == ["0.90 ± 0.03", "7", "3", ""]
