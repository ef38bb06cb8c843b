"""Training speed, waiting time, and GPU utilization."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Stopwatch:
    """Wall time without pauses, which may be nested."""

    def __init__(self) -> None:
        self._start, self._pauses = time.perf_counter(), 0
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused

    def pause(self) -> None:
        """Wait for the GPU's queued work first, since that is not a pause."""
        if self._pauses == 0:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._since = time.perf_counter()
        self._pauses += 1

    def resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            self._paused += time.perf_counter() - self._since

    def __enter__(self) -> None:
        self.pause()

    def __exit__(self, *_: object) -> None:
        self.resume()


class Throughput(Callback):
    """Logs, at logged steps, the cost of the steps since the last one, over all devices.

    | figure                    | meaning                                                                            |
    |---------------------------|------------------------------------------------------------------------------------|
    | train/tokens              | all tokens trained on so far, without padding                                      |
    | train/tokens_per_second   | of wall time, including waiting for data, without validation, samples and saving   |
    | train/step_seconds        | the same time per optimizer step                                                   |
    | train/data_seconds        | the part of it spent waiting for batches                                           |
    | train/peak_memory_gib     | peak tensor memory of this process's GPU                                           |
    | train/mfu                 | fraction of the GPUs' peak (arXiv:2204.02311, appendix B), if it is known          |
    """

    def __init__(self) -> None:
        self._before = 0  # tokens of the runs that this run continues

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._sums = pl_module.step_sums

    def state_dict(self) -> dict[str, int]:
        self._sums.read()
        return {"tokens_seen": self._before + self._sums.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._before = state_dict["tokens_seen"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = self._now(trainer, pl_module)
        self._peak = None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            from experiment.nn.peak_flops import peak_flops

            self._peak = peak_flops(torch.cuda.get_device_name(pl_module.device), trainer.precision)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.stopwatch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.stopwatch.resume()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, _: Any, batch: Any, *args: Any) -> None:
        if not pl_module.is_logged_step:
            return
        self._sums.read()
        now = self._now(trainer, pl_module)
        tokens, steps, seconds, waited = (after - before for after, before in zip(now, self._mark, strict=True))
        self._mark = now
        if steps == 0:
            return
        figures = {
            "train/tokens": self._before + self._sums.count,
            "train/tokens_per_second": tokens / seconds,
            "train/step_seconds": seconds / steps,
            "train/data_seconds": waited / steps,
        }
        if pl_module.device.type == "cuda":
            figures["train/peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        if self._peak is not None:
            flops = pl_module.flops_per_token(batch["loss_mask"].shape[1])
            figures["train/mfu"] = tokens / seconds * flops / (self._peak * trainer.world_size)
        pl_module.log_figures(figures, ["train/tokens_per_second"], to_loggers=True)

    def _now(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, ...]:
        """Tokens and steps so far, and seconds of training and of waiting for data."""
        waited = getattr(trainer.train_dataloader, "seconds", 0.0)
        return self._sums.count, self._sums.steps, pl_module.stopwatch.seconds, waited
