"""What stops a training before its end.

Ctrl-C and SIGTERM: the current step is finished and saved, then the run ends; a second signal ends it at once.
Non-finite numbers end it at once, and never reach a checkpoint.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.tensor import DTensor

from experiment.compat.lightning import ask_for_no_sigterm
from experiment.errors import InputError


class Interrupted(BaseException):
    """The run was asked to stop, and has saved its state.

    ``exit_code`` follows the shell convention for signals: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int, run_dir: str) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code, self.run_dir = 128 + number, run_dir


class StopRequest:
    """Remembers that the training was asked to stop; `stop_request` is this process's instance."""

    def __init__(self) -> None:
        self.number = 0  # the signal, 0 for none

    def listen(self, trainer: Trainer) -> None:
        """Take both signals from here on; Lightning puts the old handlers back when the trainer is done."""
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.ask)
            signal.signal(signal.SIGTERM, self.ask)
            ask_for_no_sigterm(trainer)  # its handler was removed

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)  # files are written under a temporary name and renamed: none is half-written
        self.number = number
        if rank_zero_only.rank == 0:  # not with print, which the signal may have interrupted
            os.write(2, b"\nstopping after this step; again to stop immediately\n")

    def agreed(self, trainer: Trainer) -> int:
        """The signal to stop for, 0 for none. A single process stops at once; several stop together at the first
        later step whose sums they read: on a CPU the next, on GPUs the next logged one."""
        if trainer.world_size == 1:
            return self.number
        return (self.number or signal.SIGTERM) if trainer.lightning_module.step_sums.stop_wanted else 0


stop_request = StopRequest()


def newest_checkpoint(trainer: Trainer) -> str:
    """The end of a message: where to resume from."""
    file = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    return f"the last good checkpoint is {file.resolve()}" if file.exists() else "no checkpoint was written yet"


def check_losses(trainer: Trainer) -> None:
    """Check that the loss of every step so far was finite. Call it in all processes.

    Raises:
        InputError: A loss was not finite; the message names the step and the batch.
    """
    sums = trainer.lightning_module.step_sums
    sums.read()
    if sums.failed_step is not None:
        from experiment.runs.not_finite import loss_not_finite

        raise loss_not_finite(trainer, newest_checkpoint(trainer))


def check_weights(trainer: Trainer) -> None:
    """Check, before a checkpoint is written, that every loss so far and every weight is finite.

    Raises:
        InputError: A loss or weight is not finite, for example after a non-finite gradient.
    """
    if trainer.training:
        check_losses(trainer)
    names, totals = [], []
    for name, weight in trainer.lightning_module.named_parameters():
        if weight.requires_grad:
            total = weight.detach().sum()
            # For sharded weights, over all shards.
            totals.append(total.full_tensor() if isinstance(total, DTensor) else total)
            names.append(name)
    for name, finite in zip(names, torch.stack(totals).isfinite().tolist(), strict=True):
        if not finite:
            raise InputError(
                f"after step {trainer.global_step} the weights are not finite ({name}): lower the learning rate, or "
                f"set --trainer.gradient_clip_val; {newest_checkpoint(trainer)}"
            )


class FiniteLoss(Callback):
    """Ends a run at a non-finite training loss, and reports where it occurred: on a CPU at once; else when the
    host reads the losses, at logged steps, before a validation and before a checkpoint."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if pl_module.read_when_due():
            check_losses(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            check_losses(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_losses(trainer)  # while the data module still knows the epoch's batches
