"""The report of a loss that was not finite: loaded only once there is one."""

import math
from typing import TYPE_CHECKING, Any

import torch

from experiment.errors import InputError
from experiment.sources.batches import ResumableDataModule

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def failed_batch(sums: Any) -> tuple[int, float] | None:
    """Of a run's StepSums: index and loss of this process's first non-finite batch in the failed step, if any."""
    for step, batch_idx, loss in sums.losses:
        if step == sums.failed_step and not math.isfinite(value := loss.item()):
            return batch_idx, value
    return None


def describe_batch(data: object, index: int) -> str:
    """The samples of the given batch in the current epoch, in words."""
    sampler = data.train_sampler if isinstance(data, ResumableDataModule) else None
    if sampler is None:  # a stream, whose samples have no numbers
        return f"batch {index}"
    rank, world = sampler.share
    samples = [int(sample) for sample in sampler.epoch_batches(sampler.epoch)[index * world + rank]]
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    return f"batch {index} of epoch {sampler.epoch} (samples {shown})"


def loss_not_finite(trainer: "Trainer", resume_from: str) -> InputError:
    """The error that names the step and the batch. Call it in all processes."""
    sums, what = trainer.lightning_module.step_sums, None
    if (failed := failed_batch(sums)) is not None:
        what = f"{failed[1]}, at {describe_batch(trainer.datamodule, failed[0])}"
    processes = [what]
    if trainer.world_size > 1:
        processes *= trainer.world_size
        torch.distributed.all_gather_object(processes, what)
    what = next(filter(None, processes), "not finite, although each batch's loss is")
    return InputError(
        f"the loss of step {sums.failed_step} is {what}: lower the learning rate, set --trainer.gradient_clip_val, or "
        f"look at these samples; {resume_from}"
    )
