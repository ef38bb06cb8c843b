"""Numbers that go wrong end a run at once, and never reach a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from experiment.batches import ResumableDataModule
from experiment.errors import InputError


def newest_checkpoint(trainer: Trainer) -> str:
    """The end of a sentence that says where to go on from."""
    file = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    return f"the last good checkpoint is {file.resolve()}" if file.exists() else "no checkpoint was written yet"


def check_weights(trainer: Trainer) -> None:
    """See that every weight is a number; to be called before a checkpoint is written.

    Raises:
        InputError: One is not, as after a step with a gradient that was not finite.
    """
    for name, weight in trainer.lightning_module.named_parameters():
        total = weight.detach().sum()
        if isinstance(total, DTensor):  # of weights that are divided among processes
            total = total.full_tensor()
        if weight.requires_grad and not torch.isfinite(total):
            raise InputError(
                f"after step {trainer.global_step} the weights are not finite ({name}): lower the learning rate, or "
                f"set --trainer.gradient_clip_val; {newest_checkpoint(trainer)}"
            )


class FiniteLoss(Callback):
    """Stops a run at the first training loss that is not a finite number, and says where it was."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        finite = bool(torch.isfinite(loss))
        if trainer.world_size > 1:  # all stop together, else the others wait for this one
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            data = trainer.datamodule
            where = data.describe_batch(batch_idx) if isinstance(data, ResumableDataModule) else f"batch {batch_idx}"
            raise InputError(
                f"the loss of step {max(1, trainer.global_step)} is {float(loss)}, at {where}: lower the learning "
                f"rate, set --trainer.gradient_clip_val, or look at these samples; {newest_checkpoint(trainer)}"
            )
