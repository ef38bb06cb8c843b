"""run.json: the commands, machine and versions that produced a run."""

import hashlib
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.errors import InputError
from experiment.runs.run import is_run
from experiment.sources.paths import repaired, write_text
from experiment.wording import hint

if TYPE_CHECKING:  # the report reads run.json without importing torch
    from lightning.pytorch import LightningModule, Trainer

RECORD = "run.json"
STARTED = "%Y-%m-%d %H:%M:%S %z"
PACKAGES = ("lightning", "transformers", "peft", "datasets", "tokenizers", "torchmetrics", "wandb")


def command_line(package: str, args: Sequence[str], resumed: bool = True) -> str:
    """The command, ready to paste into a shell on any machine, without --ckpt_path last if nothing was resumed."""
    line = repaired(f"tinylab {package} {shlex.join(args)}")
    return line if resumed else re.sub(" --ckpt_path[= ]last(?= |$)", "", line)


def cpu_name() -> str:
    """The CPU's name if the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace", encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def source_version() -> str | None:
    """The commit of this source, with ``-dirty-`` and a hash of the changes if files differ from it; None outside a
    git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[2]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    try:
        commit, changes = git("describe", "--always", "--exclude=*"), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty-{hashlib.sha256(changes.encode()).hexdigest()[:7]}" if changes else commit


def environment(trainer: "Trainer") -> dict[str, Any]:
    """What a run's metrics, especially its speed, depend on besides its configuration."""
    import torch

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # includes the CUDA version, unlike the package's version
    }
    if trainer.strategy.root_device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(trainer.strategy.root_device)
    if commit := source_version():
        found["source"] = commit
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def missing_run(run: Path, lacks: str) -> InputError:
    """The message for a folder that is not a run: it does not exist or `lacks` something."""
    state = f"holds no {lacks}" if run.exists() else "does not exist"
    runs = _newest([*run.parent.glob("*"), *Path("runs").glob("*/*")])
    if inside := _newest(run.glob("*")):
        near = f" (its runs are {_first(inside)})"
    elif same := [folder for folder in runs if sorted(folder.parts) == sorted(run.parts)]:
        near = f" (did you mean {same[0]}?)"
    else:
        near = hint(str(run), map(str, runs)) or (f" (there are {_first(runs)})" if runs else "")
    return InputError(f"run {run} {state}{near}: expected a run folder written by fit")


def _newest(folders: Iterable[Path]) -> list[Path]:
    """The runs among the folders, newest first; of two names, runs/demo/lm and the folder it links to, the shorter."""
    by_length = sorted(folders, key=lambda folder: -len(str(folder)))
    runs = {folder.resolve(): folder for folder in by_length if is_run(folder)}
    return sorted(runs.values(), key=lambda folder: folder.stat().st_mtime, reverse=True)


def _first(runs: Sequence[Path], most: int = 5) -> str:
    return ", ".join(map(str, runs[:most])) + " …" * (len(runs) > most)


def read_record(run: Path) -> dict[str, Any]:
    """The run.json of a run; empty if it has none, as for imported weights."""
    try:
        return json.loads((run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class RunRecord:
    """Keeps run.json up to date: one entry in ``calls`` for each time that fit was called."""

    def __init__(self, run: Path, command: str) -> None:
        self.run, self.command = run, command

    def begin(self, trainer: "Trainer", module: "LightningModule", from_step: int) -> None:
        """Add this call. Use it before training, in the first process."""
        parameters = list(module.parameters())
        self._begun = time.time()
        before = read_record(self.run).get("calls", [])
        if before and "to_step" not in before[-1] and (metrics := self.run / "metrics.csv").exists():  # it was killed
            started = datetime.strptime(before[-1]["started"], STARTED).timestamp()
            before[-1] |= {"to_step": from_step, "seconds": round(metrics.stat().st_mtime - started, 1)}
        self.record = {
            "parameters": {
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
                "total": sum(p.numel() for p in parameters),
            },
            "environment": environment(trainer),
            "calls": [
                *before,
                {
                    "command": self.command,
                    "started": time.strftime(STARTED, time.localtime(self._begun)),
                    "from_step": from_step,
                },
            ],
        }
        self._write()

    def end(self, to_step: int) -> None:
        """Record how far this call got. A killed call has no ``to_step`` until the run is resumed."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
        self.record["calls"][-1] |= {
            "to_step": to_step,
            "seconds": round(time.time() - self._begun, 1),
            "memory_mib": round(memory, 1),
        }
        self._write()

    def _write(self) -> None:
        write_text(self.run / RECORD, json.dumps(self.record, indent=2, ensure_ascii=False) + "\n")
