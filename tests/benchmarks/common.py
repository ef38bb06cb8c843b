"""What the benchmarks share: contenders that take turns, rows with the ratio first, and the machine they ran on."""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from experiment.console import console
from experiment.nn.hardware import fast_bfloat16
from experiment.startup import GLIBC, VARIABLES

ROUNDS = 5
BENCH = Path("runs/bench")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What our commands set for themselves, here for our contenders; a peer's user does not set them.
ALLOCATOR = VARIABLES | {name: str(value) for name, (_, value) in GLIBC.items()}


@dataclass
class Row:
    """One comparison; a ratio above 1 means that ours is better, whichever way the unit goes."""

    name: str
    ours: float
    peer: float
    unit: str
    ratio: float
    note: str
    machine: str


def make_row(
    name: str, ours: list[float], peer: list[float], unit: str, note: str = "", lower_is_better: bool = False
) -> Row:
    """The medians of both contenders' rounds, and their ratio."""
    a, b = statistics.median(ours), statistics.median(peer)
    ratio = b / a if lower_is_better else a / b
    return Row(name, round(a, 4), round(b, 4), unit, round(ratio, 3), note, machine())


def fastest(results: Mapping[str, list[float]], names: Iterable[str]) -> str:
    """Which of the named contenders has the highest median."""
    return max(names, key=lambda name: statistics.median(results[name]))


def beside(results: Mapping[str, list[float]], names: Iterable[str]) -> str:
    """The medians of the named contenders, for a note."""
    return ", ".join(f"{name} {statistics.median(results[name]):,.4g}" for name in names)


def left_out(contender: str, why: str) -> None:
    """Say that a contender is not measured."""
    console.print(f"{contender} is left out: {why}", style="dim")


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Measure the contenders in turn, so that all of them meet the machine's moods.

    Args:
        contenders: By name, a function or a Worker that measures once. Warm-up is theirs.
        rounds: How often each is measured.

    Returns:
        The measurements of each contender, in order.
    """
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            results[name].append(measure())
    return results


class Worker:
    """A contender in a process of its own, which works only while it is asked: ``worker()`` is one measurement.

    Args:
        target: Module-level function ``target(measured, *args)``. It warms up, calls ``measured(None)`` once, and from
            then on measures and calls ``measured(value, **details)`` again and again; each call waits until the next
            measurement is asked for. It may be called from within a training loop.
        args: Further arguments, which can be pickled.
        environment: Variables of the process beside ours and `ALLOCATOR`'s; None removes one.
    """

    def __init__(
        self, target: Callable[..., None], *args: Any, environment: Mapping[str, str | None] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(target, theirs, args), daemon=True)
        before = dict(os.environ)
        for name, value in {**ALLOCATOR, **(environment or {})}.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self.details: dict[str, Any] = {}  # of the latest measurement
        self._receive()  # warmed up

    def __call__(self) -> float:
        self._pipe.send("go")
        return self._receive()

    def _receive(self) -> Any:
        try:
            value, self.details = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a contender ended early; its error stands above") from None
        return value

    def close(self) -> None:
        """End the process, within whatever it does."""
        self._process.kill()  # a trainer would take SIGTERM for a wish to end later
        self._process.join()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(target: Callable[..., None], pipe: Any, args: tuple[Any, ...]) -> None:
    def measured(value: float | None, **details: Any) -> None:
        pipe.send((value, {"peak_memory": peak_memory(), **details}))
        pipe.recv()

    target(measured, *args)


class Turns:
    """Within a training loop: times every so many steps, tells it by ``measured``, and waits for the next turn.

    Args:
        measured: As a Worker's target gets it; told units a second, and the ``losses`` so far, the mean of each
            measurement's steps.
        steps: Steps of a measurement.
        warmup: Steps before the first.
    """

    def __init__(self, measured: Callable[..., None], steps: int, warmup: int) -> None:
        self.measured, self.steps, self.left = measured, steps, warmup
        self.units, self.window, self.losses, self.start = 0, [], [], None

    def step(self, units: int, loss: float | torch.Tensor, steps: int = 1) -> None:
        """To be called at the end of each step, with the tokens or examples that it took; or of several, with the mean
        of their losses. A device is waited for at the end of a measurement only."""
        self.units += units
        self.window.append(loss)
        self.left -= steps
        if self.left == 0:
            self.losses.append(statistics.fmean(map(float, self.window)))
            self.window = []
            warm = self.start is not None
            self.measured(self.units / (time.perf_counter() - self.start) if warm else None, losses=self.losses)
            self.units, self.left, self.start = 0, self.steps, time.perf_counter()


def check_losses(ours: list[float], peer: list[float], tolerance: float) -> str:
    """See that both contenders computed the same, step by step; returns what to say of it."""
    worst = max(abs(a - b) for a, b in zip(ours, peer, strict=True))
    if not worst <= tolerance:
        raise AssertionError(f"losses differ by {worst}, more than {tolerance}: {ours} and {peer}")
    return f"losses agree to {worst:.1g} over {len(ours)} steps"


def peak_memory() -> float:
    """The most memory that this process has held, on a GPU if it uses one, in MiB. (getrusage would count what its
    parent held before exec.)"""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def own_memory() -> float:
    """Memory of this process now, in MiB, without pages of files that it has mapped: those the system can drop."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def cpu_name() -> str:
    """The CPU's name as Linux gives it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine() -> str:
    """The GPU, if that is used, CPU, threads, and the versions of what is measured."""
    gpu = f"{torch.cuda.get_device_name()}; " if DEVICE == "cuda" else ""
    bf16 = "bf16 instructions" if fast_bfloat16() else "no bf16 instructions"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers", "peft", "numpy"))
    return (
        f"{gpu}{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {bf16}; {platform.system()}, "
        f"Python {platform.python_version()}, {packages}"
    )


def report(rows: list[Row], file: Path | None = BENCH / "bench.json") -> None:
    """Print the rows with the ratio first, and put them into the file in the place of rows of the same name."""
    table = Table("ratio", "name", "ours", "peer", "unit", "note", caption=machine(), caption_justify="left")
    for row in rows:
        table.add_row(f"{row.ratio:.2f}", row.name, f"{row.ours:,.4g}", f"{row.peer:,.4g}", row.unit, row.note)
    console.print(table)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(file.read_text()) if file.is_file() else []
        new = [asdict(row) for row in rows]
        names = {row["name"] for row in new}
        file.write_text(json.dumps([row for row in old if row["name"] not in names] + new, indent=1) + "\n")
