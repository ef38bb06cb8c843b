"""Batches in an order that is known in advance: shuffled by seed and epoch, shared among processes, resumable."""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch.distributed
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from experiment.errors import InputError

Batches = Sequence[Sequence[int]]


def rank_and_processes() -> tuple[int, int]:
    """Call lazily: the process group is initialized after the data module."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def rounded_width(longest: int, limit: int) -> int:
    """The width of a batch whose longest row has ``longest`` tokens: a multiple of 16, above 256 of 32, and so on.

    Ever-changing batch widths cost memory and time: allocators cannot reuse blocks, and kernels are
    selected or compiled again. There are eight widths per power of two; padding is about a twentieth.

    Args:
        longest: At least 1, at most ``limit``.
        limit: The maximum width, which need not be such a multiple.
    """
    step = max(16, 1 << max(0, (longest - 1).bit_length() - 4))
    return min(-(-longest // step) * step, limit)


class EpochBatchSampler(SequentialSampler):
    """Yields the index lists of one epoch's batches; to be used as ``DataLoader(data, sampler=it, batch_size=None)``.

    Process r of w takes the batches r, r + w, r + 2w, … of an epoch, so w processes with batches of B take the
    steps of one process with batches of w B. Processes without a batch at the end get an
    empty one, so that all take the same number of steps: a collective would otherwise hang.

    Args:
        epoch_batches: Returns all batches of an epoch: deterministic, and equally many in every epoch.

    It counts as sequential: Lightning's ``overfit_batches`` replaces any other sampler by one of single samples.
    Epochs are counted here, one per pass over the sampler: Lightning's own count jumps if a run that
    ended within an epoch is given more steps.
    """

    def __init__(self, epoch_batches: Callable[[int], Batches]) -> None:
        self.epoch_batches = epoch_batches
        self.epoch = 0  # the current epoch, or the first one
        self.start = 0  # its batches done before a resume
        self.begun = False

    @property
    def share(self) -> tuple[int, int]:
        """Rank and number of the processes."""
        return rank_and_processes()

    def __len__(self) -> int:
        _, world = self.share
        return -(-len(self.epoch_batches(self.epoch)) // world)

    def __iter__(self) -> Iterator[Sequence[int]]:
        rank, world = self.share
        if self.begun:
            self.epoch += 1
        self.begun = True
        own = self.epoch_batches(self.epoch)[rank::world]
        start, self.start = self.start, 0
        yield from [*own, []][start : len(self)]


class DeviceLoader(DataLoader):
    """A DataLoader of dictionaries that measures how long training waits for it. For a GPU it is one batch
    ahead: the next one is copied from pinned memory while this one is used.

    Attributes:
        device: The GPU that batches go to; None leaves them where they are.
        seconds: Time that training has waited for batches.
    """

    device: torch.device | None = None
    seconds = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = super().__iter__()
        if self.device is None:
            while (batch := self._timed(lambda: next(batches, None))) is not None:
                yield batch
            return
        stream = torch.cuda.Stream(self.device)
        ahead = self._timed(lambda: self._sent(batches, stream))
        while ahead is not None:
            batch, ahead = ahead, self._timed(lambda: self._sent(batches, stream))
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(current)  # its memory is not reused before this stream is done with it
            yield batch

    def _timed(self, fetch: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        batch = fetch()
        self.seconds += time.perf_counter() - start
        return batch

    def _sent(self, batches: Iterator[dict[str, Any]], stream: torch.cuda.Stream) -> dict[str, Any] | None:
        """The next batch on its way to the device."""
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return {
                name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }


class ResumableDataModule(LightningDataModule):
    """Stores in the checkpoint how many batches of the current epoch are done, and continues from there.

    Lightning offers the same with stateful loaders, but loses their state once the number of steps has been
    requested, as every cosine schedule does (pytorch-lightning#20550); it always keeps the data module's own
    state. Subclasses set ``train_sampler`` in ``train_dataloader``.
    """

    train_sampler: EpochBatchSampler | None = None
    step_parts: Mapping[str, int]  # what one process trains in one batch, such as 32 sequences of 128 tokens
    global_batch: tuple[str, int | None]  # the option that sets the size of an optimizer step, and its value

    @property
    def on_gpu(self) -> bool:
        """Whether batches go to a CUDA GPU."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def device_loader(self, data: Any, **options: Any) -> DeviceLoader:
        """A loader of ``data``, whose items are whole batches, onto the trainer's device."""
        loader = DeviceLoader(data, batch_size=None, pin_memory=self.on_gpu, **options)
        loader.device = self.trainer.strategy.root_device if self.on_gpu else None
        return loader

    _position: tuple[int, int] = (0, 0)  # epoch, and batches of it that were done
    rescaled: int | None = None  # the latter, if the number of batches per epoch has changed

    def state_dict(self) -> dict[str, Any]:
        """The position to continue from: the epoch, and the batches of it that each process has done."""
        batches, epoch = self.trainer.fit_loop.epoch_loop.batch_progress, self.train_sampler.epoch
        epochs = self.trainer.fit_loop.epoch_progress.current
        # A batch that has begun but is not done yet is repeated.
        done = batches.current.processed
        # After the last batch Lightning continues with the next epoch, unless fit ended with this one.
        if batches.is_last_batch and done == batches.current.ready and epochs.processed < epochs.ready:
            epoch, done = epoch + 1, 0
        sizes = self._sizes(epoch)
        samples = sum(sizes[: done * self.trainer.world_size])
        share = -(-len(sizes) // self.trainer.world_size)
        return {"epoch": epoch, "batches_done": done, "batches": share, "samples_done": samples}

    def _sizes(self, epoch: int) -> list[int]:
        """Samples in each batch of an epoch, over all processes."""
        return [len(batch) for batch in self.train_sampler.epoch_batches(epoch)]

    def accumulation(self, processes: int, given: int) -> int:
        """Micro-batches per optimizer step: as the global batch requires, or ``given`` if that is not set.

        Raises:
            InputError: No number of them gives the global batch, or ``given`` contradicts it.
        """
        option, whole = self.global_batch
        if whole is None:
            return given
        at_once = processes * math.prod(self.step_parts.values())
        if whole % at_once or whole < 1:
            lower = max(0, whole) // at_once * at_once
            near = " or ".join(f"{value:,}" for value in (lower, lower + at_once) if value)
            raise InputError(
                f"data.{option} {whole:,} is not a multiple of what trains at once ({self._product(processes, 1)}): "
                f"expected {near}, or another data.batch_size"
            )
        if given not in (1, whole // at_once):
            raise InputError(
                f"trainer.accumulate_grad_batches {given}: data.{option} {whole:,} makes it {whole // at_once}; give "
                "only one of the two"
            )
        return whole // at_once

    def check(self, trainer: Trainer) -> None:
        """Check, after setup, that epochs, processes, accumulation and validation are consistent.

        Raises:
            InputError: They are not; the message lists all problems.
        """
        if problems := list(self._problems(trainer)):
            raise InputError("; ".join(problems))

    def _problems(self, trainer: Trainer) -> Iterator[str]:
        if trainer.log_every_n_steps < 0:
            yield f"trainer.log_every_n_steps {trainer.log_every_n_steps}: expected 0 (none) or more"
        loader = self.train_dataloader()
        if trainer.reload_dataloaders_every_n_epochs and loader.num_workers:
            yield (
                f"trainer.reload_dataloaders_every_n_epochs {trainer.reload_dataloaders_every_n_epochs}: workers would "
                "begin each epoch twice; give data.num_workers 0"
            )
        if self.train_sampler is None:  # a stream, which has no epochs
            if trainer.max_steps < 0:
                yield "trainer.max_steps is not given: data.streaming never ends, so max_steps must end the run"
            if trainer.overfit_batches:
                found = f"trainer.overfit_batches {trainer.overfit_batches}"
                yield f"{found}: a stream cannot repeat its batches; give data.streaming false"
            return
        total, processes = len(self.train_sampler.epoch_batches(0)), trainer.world_size
        batches = -(-total // processes)
        if total < processes:
            yield (
                f"the training split makes {total} batches for {processes} processes: lower data.batch_size, or take "
                "fewer processes"
            )
        accumulated = trainer.accumulate_grad_batches
        if accumulated < 1:
            yield f"trainer.accumulate_grad_batches {accumulated}: expected 1 or more"
            return
        if batches < accumulated:
            yield (
                f"trainer.accumulate_grad_batches {accumulated} is more than the {batches} batches of an epoch: lower "
                "it, or lower data.batch_size"
            )
        # None if the Trainer validates by time.
        interval, steps = getattr(trainer, "val_check_interval", None), -(-batches // accumulated)
        if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and steps < interval:
            yield (
                f"trainer.val_check_interval {interval} is more than the {steps} optimizer steps of an epoch: lower "
                "it, or set trainer.check_val_every_n_epoch null, so that steps are counted over the whole run"
            )

    def describe_step(self, processes: int, accumulated: int) -> str:
        """The size of an optimizer step, in words."""
        return f"each step trains {self._product(processes, accumulated)}"

    def _product(self, processes: int, accumulated: int) -> str:
        parts = [f"{value:,} {name}" for name, value in self.step_parts.items()]
        for name, count in (("processes", processes), ("micro-batches", accumulated)):
            parts += [f"{count} {name}"] if count > 1 else []
        total = math.prod(self.step_parts.values()) * processes * accumulated
        return " x ".join(parts) + (f" = {total:,}" if len(parts) > 1 else "")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "epoch" not in state_dict:
            raise InputError("this run streamed its data: resume it with --data.streaming true")
        epoch, done = int(state_dict["epoch"]), int(state_dict["batches_done"])
        if self.train_sampler is None:  # no training, or its loader does not exist yet
            self._position = epoch, done
            return
        before, sizes = state_dict.get("batches"), self._sizes(epoch)
        share = -(-len(sizes) // self.trainer.world_size)
        if before is not None and before != share:
            if self.trainer.max_epochs not in (None, -1) or self.trainer.max_steps == -1:
                raise InputError(
                    f"an epoch has {share} batches a process, and had {before} when the checkpoint was written, so "
                    "the end of the last epoch is unclear; restore data.batch_size and the number of processes, "
                    "or give --trainer.max_steps and --trainer.max_epochs -1"
                )
            if done:
                batches = bisect_right(list(accumulate(sizes)), state_dict["samples_done"])
                self.rescaled = done = batches // self.trainer.world_size
        elif done == share and self.trainer.max_steps == -1:  # then Lightning starts an epoch; else it ends this one
            epoch, done = epoch + 1, 0
        self._position = epoch, done
        self.train_sampler.epoch, self.train_sampler.start = self._position

    def resumable(self, sampler: EpochBatchSampler) -> EpochBatchSampler:
        """Register the training loader's sampler, so that it starts where the checkpoint left off, or continues
        after the epochs of the loader that it replaces."""
        if self.trainer is not None and self.trainer.overfit_batches:
            always = sampler.epoch_batches(0)  # the same batches in each epoch
            sampler.epoch_batches = lambda epoch: always
        if (before := self.train_sampler) is not None:
            sampler.epoch, sampler.start, sampler.begun = before.epoch, before.start, before.begun
        else:
            sampler.epoch, sampler.start = self._position
        self.train_sampler = sampler
        return sampler
