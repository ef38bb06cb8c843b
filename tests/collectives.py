"""``python -m tests.collectives FILE fit …``: a training that notes what its processes do together in each step.

DDP's averaging of gradients, and its broadcast of buffers, do not go through these functions.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed

from experiment.commands.main import run as run_cli
from experiment.compat.lightning import is_accumulating
from experiment.runs.step_sums import StepModule
from lm.cli import LanguageCLI

NAMES = ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor", "reduce", "gather")


def run(file: Path, arguments: list[str]) -> None:
    calls: list[str] = []
    for name in NAMES:
        function = getattr(torch.distributed, name)

        def counted(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        setattr(torch.distributed, name, counted)
    taken: dict[int, list[str]] = {}
    ended = StepModule.on_train_batch_end

    def on_train_batch_end(self: StepModule, *args: Any) -> None:
        ended(self, *args)
        if not is_accumulating(self.trainer):
            taken[self.trainer.global_step] = list(calls)
            calls.clear()

    StepModule.on_train_batch_end = on_train_batch_end
    run_cli(LanguageCLI, arguments)
    file.write_text(json.dumps(taken))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
