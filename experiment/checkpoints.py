"""Checkpoints under names that do not change: last.ckpt to go on from, best.ckpt to use."""

from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Saves the model, the optimizer and the position in the data every so many steps and at the end of fit.

    The newest is always reachable as ``checkpoints/last.ckpt``.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 1) -> None:
        """
        Args:
            every_n_steps: Optimizer steps between two checkpoints.
            keep: How many of these checkpoints stay on disk, the newest ones; -1 keeps all.
        """
        super().__init__(
            filename="step-{step:06d}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            save_last="link",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir).resolve() / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the model of the best validation so far as ``checkpoints/best.ckpt``."""

    def __init__(self, monitor: str = "val/loss", mode: Literal["min", "max"] = "min") -> None:
        """
        Args:
            monitor: The validation metric that decides.
            mode: Whether its smallest or its largest value is the best.
        """
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=False,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir).resolve() / "checkpoints")
        super().setup(trainer, pl_module, stage)
