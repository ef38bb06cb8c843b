"""What in a configuration cannot be right, told all at once before a training starts."""

from collections.abc import Iterator

from lightning.pytorch import Trainer

from experiment.errors import InputError
from experiment.sources.batches import ResumableDataModule


def check_training(trainer: Trainer, data: ResumableDataModule) -> None:
    """See that epochs, processes, accumulation and validation go together; the data is set up.

    Raises:
        InputError: They do not; the message lists everything that was found.
    """
    if problems := list(_problems(trainer, data)):
        raise InputError("; ".join(problems))


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
