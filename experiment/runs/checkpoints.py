"""Checkpoints that a run resumes from exactly, under fixed names.

``last.ckpt`` is the newest, ``best.ckpt`` that of the best validation. Both are written under another name and renamed,
so that a kill at any moment leaves the last complete one in place.
"""

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.lr_scheduler import LambdaLR

from experiment.compat.lightning import is_accumulating, log_by_optimizer_steps
from experiment.errors import InputError
from experiment.runs.stopping import Interrupted, check_weights, newest_checkpoint, stop_request
from experiment.sources.paths import remove


def save_atomically(trainer: Trainer, file: Path) -> None:
    """Write a checkpoint to ``file`` atomically. Call it in all processes.

    Raises:
        InputError: It cannot be written; an existing file is left unchanged.
    """
    partial = file.with_name(f"{file.name}.partial")
    with trainer.lightning_module.stopwatch:
        check_weights(trainer)
        try:
            trainer.save_checkpoint(partial, weights_only=False)  # None would warn each time
            if trainer.is_global_zero:
                if partial.is_dir():
                    from experiment.runs.sharding import put_folder

                    put_folder(partial, file, trainer.global_step)
                else:
                    with partial.open("r+b") as stream:
                        os.fsync(stream.fileno())  # else a power loss could leave the new name without content
                    if file.is_dir() and not file.is_symlink():  # written by several processes
                        remove(file)
                    partial.replace(file)
        except Exception as error:
            with suppress(OSError):
                remove(partial)
            # torch reports a full disk as a RuntimeError of its writer; others, such as out of memory, are not.
            if not isinstance(error, OSError) and "inline_container" not in str(error):
                raise
            cause = getattr(error, "strerror", None) or error
            raise InputError(
                f"{file} cannot be written ({cause}): free space, or copy the run's folder elsewhere, and continue "
                f"with --ckpt_path last; {newest_checkpoint(trainer)}"
            ) from error


class FileCheckpointIO(TorchCheckpointIO):
    """Writes directly to the file. Lightning's own makes a copy in memory and another in the temporary folder,
    which a kill leaves behind. Reads checkpoints of one or several processes, verified once."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from experiment.runs.reading import read_checkpoint

        return read_checkpoint(Path(path), part="all")

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)


class StepCheckpoint(Checkpoint):
    """Saves the model, the optimizer and the position in the data at intervals and when fit ends or is stopped.

    Lightning's ModelCheckpoint saves before the step's metrics are logged and its validation is done, so that a run
    killed in between would miss them; this one saves after everything in a step is done.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 1) -> None:
        """
        Args:
            every_n_steps: Optimizer steps between two checkpoints.
            keep: Number of newest checkpoints to keep on disk; -1 keeps all.
        """
        if every_n_steps < 1:
            raise InputError(f"checkpoint.every_n_steps {every_n_steps}: expected 1 or more")
        if keep < 1 and keep != -1:
            raise InputError(f"checkpoint.keep {keep}: expected 1 or more, or -1 for all")
        self.every_n_steps = every_n_steps
        self.keep = keep

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one chosen by the user
            trainer.strategy.checkpoint_io = FileCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        stop_request.listen(trainer)
        if trainer.is_global_zero:
            for left in (Path(trainer.default_root_dir) / "checkpoints").glob("*.partial"):  # left by a killed run
                remove(left)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0 and (number := stop_request.agreed(trainer)):
            self._save(trainer)
            raise Interrupted(number, trainer.default_root_dir)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._saved_step or trainer.fast_dev_run:
            return
        self._saved_step = step
        folder = Path(trainer.default_root_dir) / "checkpoints"
        file = folder / f"step-{step:06d}.ckpt"
        save_atomically(trainer, file)
        if trainer.is_global_zero:
            last = folder / "last.ckpt.partial"
            last.unlink(missing_ok=True)
            try:
                last.symlink_to(file.name)
            except OSError:  # a file system without links
                shutil.copyfile(file, last)
            last.replace(folder / "last.ckpt")
            if self.keep > 0:
                # By age, not step: a run resumed from an earlier checkpoint repeats steps.
                others = sorted(set(folder.glob("step-*.ckpt")) - {file}, key=lambda old: old.stat().st_mtime_ns)
                for old in others[: max(0, len(others) - (self.keep - 1))]:
                    remove(old)


class BestCheckpoint(Checkpoint):
    """Keeps the model of the best validation so far as ``checkpoints/best.ckpt``."""

    def __init__(self, monitor: str = "val/loss", mode: Literal["min", "max"] = "min") -> None:
        """
        Args:
            monitor: The validation metric that decides.
            mode: Whether its smallest or largest value is best.
        """
        self.monitor, self.mode = monitor, mode
        self.best_score: float | None = None
        self.best_step: int | None = None  # of this call's validations

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "best_score": self.best_score}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # ModelCheckpoint, the former base class, used a longer key and best_model_score.
        states = [state for key, state in checkpoint["callbacks"].items() if key.startswith(type(self).__name__)]
        for state in states:
            score = state.get("best_score", state.get("best_model_score"))
            if score is not None and state["monitor"] == self.monitor and self._file(trainer).exists():
                self.best_score = float(score)

    def is_better(self, trainer: Trainer) -> bool:
        """Whether the latest validation is the best so far.

        Raises:
            InputError: The monitored metric was not logged.
        """
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise InputError(f"best.monitor {self.monitor}: there is no such metric; expected one of {known}")
        score = float(trainer.callback_metrics[self.monitor])
        best = self.best_score
        better = best is None or math.isnan(best) or (score < best if self.mode == "min" else score > best)
        return trainer.strategy.reduce_boolean_decision(better)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run
        if fitting and self.is_better(trainer):
            self.best_score = float(trainer.callback_metrics[self.monitor])
            self.best_step = trainer.global_step
            save_atomically(trainer, self._file(trainer))

    def _file(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / "best.ckpt"


class ExactResume(Callback):
    """Saves and restores what Lightning leaves out: random states, and the count of logged steps.

    Configured values override the checkpoint's: learning rates, decay, betas and whatever else a parameter
    group has, the patience of EarlyStopping, the seed. Unchanged ones are bit-identical.

    It also validates after the last step of a run if the interval does not include that step.
    """

    def __init__(self) -> None:
        self._random_states: list[dict[str, Any]] | None = None  # of each process
        self._patience: list[int] = []
        self._groups: list[list[dict[str, Any]]] = []  # of each optimizer, as configured

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {"cpu": torch.get_rng_state(), "seed": torch.initial_seed()}
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.get_rng_state()
        if not torch.distributed.is_initialized():
            return {"processes": [states]}
        processes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(processes, states)
        return {"processes": processes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_states = state_dict["processes"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patience = [callback.patience for callback in trainer.early_stopping_callbacks]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By now the checkpoint's callbacks are restored, but not its optimizers.
        for callback, patience in zip(trainer.early_stopping_callbacks, self._patience, strict=True):
            callback.patience = patience
        self._groups = [
            [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
            for groups in (optimizer.param_groups for optimizer in trainer.optimizers)
        ]

    def _configure(self, trainer: Trainer) -> None:
        """Apply the configured values to the restored optimizers and schedules."""
        for optimizer, configured in zip(trainer.optimizers, self._groups, strict=True):
            for group, options in zip(optimizer.param_groups, configured, strict=True):
                group.update(options)
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if isinstance(scheduler, LambdaLR):
                groups = scheduler.optimizer.param_groups
                scheduler.base_lrs = [group["initial_lr"] for group in groups]
                for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                    group["lr"] = base * factor(scheduler.last_epoch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)  # else all drop the same neurons
        if self._random_states is not None:
            # A batch in progress when the checkpoint was written is repeated; counted twice, it would shift every
            # later validation.
            progress = trainer.fit_loop.epoch_loop.batch_progress
            batches = progress.total
            batches.ready = batches.started = batches.processed = batches.completed
            if (done := getattr(trainer.datamodule, "rescaled", None)) is not None:
                batches = progress.current
                batches.ready = batches.started = batches.processed = batches.completed = done
            self._configure(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        log_by_optimizer_steps(trainer)
        if self._random_states is not None:
            if len(self._random_states) == trainer.world_size:  # with another number of processes it differs anyway
                states = self._random_states[trainer.global_rank]
                if states.get("seed", torch.initial_seed()) == torch.initial_seed():  # else a different one was given
                    torch.set_rng_state(states["cpu"].cpu())
                    if "cuda" in states and torch.cuda.is_available():
                        torch.cuda.set_rng_state(states["cuda"].cpu())
            self._random_states = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        if loop.epoch_loop.batch_progress.is_last_batch:
            torch.empty((), dtype=torch.int64).random_()  # the seed that the next epoch's iterator would draw
        else:  # Lightning counts the epoch as finished
            for count in (loop.epoch_progress.total, loop.epoch_progress.current):
                count.processed, count.completed = count.processed - 1, count.completed - 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step >= trainer.estimated_stepping_batches and not is_accumulating(trainer):
            trainer.should_stop = True
