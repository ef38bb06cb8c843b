"""Peak memory and time of `python -m classify test` on real reviews, by their number: memory must not grow with it.

python tests/benchmarks/evaluation.py [--reviews "[1000, 3000, 24800]"] [--over configs/classify/minilm.yaml]

The model has its initial weights, which changes neither. What is tested are training reviews of ../shared/data/imdb: at
most 24,800 of its 25,000, for 200 are drawn for the other splits.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine
from jsonargparse import auto_cli
from rich.table import Table

from experiment.console import console

REAL = Path("../shared/data/imdb")


def measure(reviews: int, over: Path, data: Path, run_dir: Path) -> tuple[float, float, float]:
    """Peak memory in MiB, seconds and CPU seconds of one evaluation, in a process of its own."""
    configs = [f"--config={config}" for config in ("configs/classify/custom.yaml", over)]
    flags = {"data.path": data, "data.train_size": 100, "data.validation_size": 100, "data.eval_max_length": 512}
    flags |= {"data.test_size": reviews, "run_dir": run_dir}
    given = (f"--{name}={value}" for name, value in flags.items())
    command = [sys.executable, "-m", "classify", "test", *configs, *given]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError("an evaluation has failed; its error stands above")
    return usage.ru_maxrss / 1024, time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def main(reviews: list[int] = [1000, 3000], over: Path = Path("configs/classify/minilm.yaml")) -> None:  # noqa: B006
    """Evaluates each number of reviews once, after one of 100 that fills the caches, and prints a table.

    Args:
        reviews: How many, one evaluation each.
        over: Configuration laid over custom.yaml.
    """
    columns = ("reviews", "peak memory, MiB", "seconds", "CPU seconds", "reviews/s")
    table = Table(*columns, caption=machine(), caption_justify="left")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        for split, file in (("train", "test.parquet"), ("test", "train.parquet")):  # there are most to train on
            (data / f"{split}.parquet").symlink_to((REAL / file).resolve())
        for number in (100, *reviews):
            peak, seconds, cpu = measure(number, over, data, Path(folder, "run"))
            table.add_row(f"{number:,}", f"{peak:,.0f}", f"{seconds:.0f}", f"{cpu:.0f}", f"{number / seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
