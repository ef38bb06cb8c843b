"""Private interfaces of Lightning. A release that changes one breaks tests/experiment/test_compat.py."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the optimizer step has more micro-batches after this one."""
    return trainer.fit_loop._should_accumulate()


def log_by_optimizer_steps(trainer: Trainer) -> None:
    """Correct the count that decides when ``self.log`` reaches the loggers: after a resume it is one off."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def validate_by_steps(trainer: Trainer) -> None:
    """Make ``val_check_interval`` count optimizer steps, as all other intervals do; Lightning counts batches."""
    loop = trainer.fit_loop.epoch_loop
    by_batches = loop._should_check_val_fx

    def is_due(fetcher: Any) -> bool:
        interval = trainer.val_check_interval
        if trainer.should_stop or not isinstance(interval, int) or not loop._should_check_val_epoch():
            return by_batches(fetcher)
        steps = trainer.global_step
        if trainer.check_val_every_n_epoch is not None:  # then they are those of the epoch
            steps = -(-(loop.batch_idx + 1) // trainer.accumulate_grad_batches)
        return not is_accumulating(trainer) and steps % interval == 0

    loop._should_check_val_fx = is_due


def validate_within_fit(trainer: Trainer) -> None:
    """Validate now, as the epoch loop does between two steps."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def leave_sigterm_alone(trainer: Trainer) -> None:
    """Keep Lightning from answering SIGTERM with a collective, which hangs if only one process got the signal."""
    trainer._signal_connector._sigterm_notifier_fn = lambda number, frame: None


def ask_for_no_sigterm(trainer: Trainer) -> None:
    """Skip the collective before each batch that checks whether the first process got a SIGTERM."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def keep_buffers_local(trainer: Trainer) -> None:
    """Keep DDP from sending buffers in each step, unless its options say otherwise."""
    options: dict[str, Any] = trainer.strategy._ddp_kwargs
    options.setdefault("broadcast_buffers", False)


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """How many processes share the weights. Its constructor would have to know it before the launch."""
    strategy._data_parallel_size = size
