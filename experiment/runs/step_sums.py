"""Sums over an optimizer step, on the device and over all processes, and when the host reads them.

Reading a number from a device waits until all earlier work is done. So the sums of a step stay on the device,
as one small tensor that processes add up with one all-reduce. The host reads the pending ones at logged steps,
before a validation and before a checkpoint; on a CPU, which needs no waiting, after each step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from experiment.compat.lightning import is_accumulating
from experiment.runs.stopping import stop_request
from experiment.runs.throughput import Stopwatch
from experiment.sources.batches import rank_and_processes

UNIT = 4096.0  # divides losses before backward, so that gradients fit float16
MOST_UNREAD = 100  # steps; bounds the memory, and how late several GPU processes stop


class StepSums:
    """Sums of each optimizer step over its micro-batches and processes, to compute means and mean gradients.

    Attributes:
        count: Tokens or examples in all steps read so far.
        steps: The number of steps read so far.
        means: The means of the newest step read, by name.
        failed_step: The first step whose loss was not finite.
        stop_wanted: Whether any process was asked to stop, the same in all processes.
    """

    def __init__(self, *names: str) -> None:
        """
        Args:
            names: Names of the sums; the loss first.
        """
        self.names = names
        self.reset()

    def reset(self) -> None:
        """Begin a training."""
        self.count = self.steps = 0
        self.means: dict[str, float] = {}
        self.failed_step: int | None = None
        self.stop_wanted = False
        self._window: Tensor | None = None  # sums over the micro-batches of the current step: count, then as in `names`
        self._unread: list[tuple[int, Tensor]] = []
        self.losses: list[tuple[int, int, Tensor]] = []  # step, index of the batch, loss of this process

    def add(self, step: int, batch_idx: int, count: Tensor, *sums: Tensor) -> None:
        """Add a micro-batch.

        Args:
            step: The optimizer step it belongs to, from 1.
            batch_idx: Lightning's number of the batch.
            count: Number of tokens or examples, a scalar.
            sums: Sums over these, scalars; the loss first.
        """
        own = torch.stack([part.detach().float() for part in (count, *sums)])
        self._window = own if self._window is None else self._window + own
        self.losses.append((step, batch_idx, own[1]))

    def finish(self, step: int) -> Tensor:
        """End a step and return its count over all processes. Call it in every process after the last micro-batch."""
        sums, self._window = self._window, None
        if rank_and_processes()[1] > 1:
            sums = F.pad(sums, (0, 1), value=float(stop_request.number != 0))
            torch.distributed.all_reduce(sums)
        self._unread.append((step, sums))
        return sums[0].clamp(min=1)

    @property
    def is_full(self) -> bool:
        """Whether the sums must be read now to bound memory."""
        return len(self._unread) >= MOST_UNREAD

    def read(self) -> None:
        """Copy the pending sums to the host. This is the only place where the host waits for the device."""
        if not self._unread:
            return
        rows = torch.stack([sums for _, sums in self._unread]).tolist()
        for (step, _), (count, *values) in zip(self._unread, rows, strict=True):
            self.count += round(count)
            self.steps += 1
            self.means = {name: value / max(count, 1) for name, value in zip(self.names, values, strict=False)}
            if self.failed_step is None and not math.isfinite(values[0]):
                self.failed_step = step
            self.stop_wanted |= len(values) > len(self.names) and values[-1] > 0
        self._unread.clear()
        if self.failed_step is None:
            self.losses.clear()


class StepModule(LightningModule):
    """A LightningModule that trains on the mean over all tokens or examples of an optimizer step, however these
    are split into micro-batches and processes, and logs ``train/`` metrics at logged steps.

    Any callback's ``on_before_optimizer_step`` sees the gradients of that mean, and ``outputs["loss"]`` is the mean of
    the micro-batch, which Lightning has divided by their number.
    """

    def __init__(self, *names: str) -> None:
        """
        Args:
            names: Names of the logged means; the loss first.
        """
        super().__init__()
        self.step_sums = StepSums(*names)
        self.stopwatch = Stopwatch()  # paused during anything but training
        self._gradient_norm: Tensor | None = None

    def on_fit_start(self) -> None:
        self.step_sums.reset()

    @property
    def _parts(self) -> int:
        """The number of losses that a step's gradients average: Lightning divides by the number of micro-batches,
        and a strategy by the number of processes."""
        return self.trainer.accumulate_grad_batches * self.trainer.world_size

    def step_loss(self, batch_idx: int, count: Tensor, *sums: Tensor) -> Tensor:
        """The result of ``training_step``: the mean loss of a micro-batch with ``count`` tokens or examples and their
        ``sums``, the loss first.

        Its gradient is that of the mean over the step if the micro-batch is all of it. Otherwise it is that of
        sum / UNIT, which `on_after_backward` scales once the step's number of tokens is known.
        """
        self.step_sums.add(self.trainer.global_step + 1, batch_idx, count, *sums)
        mean = sums[0] / count.clamp(min=1)
        if self._parts == 1:
            return mean
        scaled = sums[0] / UNIT
        return scaled + (mean - scaled).detach()

    def on_after_backward(self) -> None:
        if is_accumulating(self.trainer):
            return
        count = self.step_sums.finish(self.trainer.global_step + 1)
        if self._parts > 1:
            from experiment.compat.torch import foreach

            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            foreach("mul_", gradients, UNIT * self._parts / count)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning refuses to clip for a fused optimizer under mixed precision: a gradient scaler would not have
        unscaled the gradients yet. bfloat16 needs no scaler, so there is nothing to refuse."""
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            self._gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    @property
    def is_logged_step(self) -> bool:
        """Whether the step that just ended is a logged one."""
        trainer, interval = self.trainer, self.trainer.log_every_n_steps
        due = interval > 0 and (trainer.global_step % interval == 0 or trainer.should_stop)
        return due and not is_accumulating(trainer)

    @property
    def reading_is_free(self) -> bool:
        """Whether the host can read the sums without waiting."""
        return self.device.type == "cpu"

    def read_when_due(self) -> bool:
        """Read the sums if the step that just ended is logged, or if reading is free; returns whether it did."""
        if is_accumulating(self.trainer):
            return False
        due = self.reading_is_free or self.is_logged_step or self.step_sums.is_full
        if due:
            self.step_sums.read()
        return due

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.read_when_due():
            figures = {f"train/{name}": mean for name, mean in self.step_sums.means.items()}
            shown = list(figures)
            figures["train/learning_rate"] = self._learning_rate
            if self.is_logged_step and (norm := self._gradient_norm) is not None:
                figures["train/gradient_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            self.log_figures(figures, shown, to_loggers=self.is_logged_step)

    def log_figures(self, figures: Mapping[str, float], shown: Sequence[str], to_loggers: bool) -> None:
        """Log numbers known to the host for callbacks, ``shown`` ones for the progress bar, and maybe for the loggers.

        As in Lightning's LearningRateMonitor: ``self.log`` would send them to the device as float32 and read back those
        of the progress bar in each step.
        """
        trainer = self.trainer
        trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in figures.items()})
        trainer.progress_bar_metrics.update({name: figures[name] for name in shown})
        if not to_loggers:
            return
        for logger in trainer.loggers:
            logger.log_metrics({**figures, "epoch": trainer.current_epoch}, step=trainer.global_step)
