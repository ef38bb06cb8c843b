"""Mistakes in a configuration, all reported at once before training starts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from experiment.errors import InputError
from experiment.sources.batches import ResumableDataModule


def check_training(trainer: Trainer, data: ResumableDataModule) -> None:
    """Check that epochs, processes, accumulation and validation go together; the data is set up.

    Raises:
        InputError: They do not; the message lists everything that was found.
    """
    if problems := list(_problems(trainer, data)):
        raise InputError("; ".join(problems))


def check_resume(trainer: Trainer, module: LightningModule, stored: Mapping[str, Any], file: Path) -> str | None:
    """The option by which nothing is left to train from a checkpoint on; None where something is.

    Raises:
        InputError: The checkpoint is of another optimizer.
    """
    try:
        epochs = stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    except (KeyError, TypeError):  # an imported model
        return None
    groups = [len(group["params"]) for group in module.parameter_groups()]
    states = stored.get("optimizer_states", [])
    before = [len(group["params"]) for state in states for group in state.get("param_groups", [])]
    if before not in ([], groups):
        raise InputError(
            f"{file} is of another optimizer: its groups hold {before} weights, expected {groups}; give the "
            "options, and the version of tinylab, that it was trained with, or begin a new run"
        )
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= stored["global_step"]:
        return f"trainer.max_steps {trainer.max_steps}"
    if loop.max_epochs is not None and 0 <= loop.max_epochs <= epochs:
        limit = f"trainer.max_epochs {loop.max_epochs}"
        loop.max_epochs = epochs  # Lightning refuses a smaller one
        return limit
    return None


def _problems(trainer: Trainer, data: ResumableDataModule) -> Iterator[str]:
    if trainer.log_every_n_steps < 0:
        yield f"trainer.log_every_n_steps {trainer.log_every_n_steps}: expected 0 (none) or more"
    loader = data.train_dataloader()
    if trainer.reload_dataloaders_every_n_epochs and loader.num_workers:
        yield (
            f"trainer.reload_dataloaders_every_n_epochs {trainer.reload_dataloaders_every_n_epochs}: workers would "
            "begin each epoch twice; give data.num_workers 0"
        )
    if data.train_sampler is None:  # a stream, which has no epochs
        if trainer.max_steps < 0:
            yield "trainer.max_steps is not given: data.streaming has no last story, so it must end the run"
        if trainer.overfit_batches:
            found = f"trainer.overfit_batches {trainer.overfit_batches}"
            yield f"{found}: a stream has no batches to come back to; give data.streaming false"
        return
    total, processes = len(data.train_sampler.epoch_batches(0)), trainer.world_size
    batches = -(-total // processes)
    if total < processes:
        yield (
            f"the training split makes {total} batches for {processes} processes: lower data.batch_size, or take fewer "
            "processes"
        )
    accumulated = trainer.accumulate_grad_batches
    if accumulated < 1:
        yield f"trainer.accumulate_grad_batches {accumulated}: expected 1 or more"
        return
    if batches < accumulated:
        yield (
            f"trainer.accumulate_grad_batches {accumulated} is more than the {batches} batches of an epoch: lower it, "
            "or lower data.batch_size"
        )
    # A Trainer that checks by time has none.
    interval, steps = getattr(trainer, "val_check_interval", None), -(-batches // accumulated)
    if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and steps < interval:
        yield (
            f"trainer.val_check_interval {interval} is more than the {steps} optimizer steps of an epoch: lower it, or "
            "set trainer.check_val_every_n_epoch null, so that steps are counted over the whole run"
        )
