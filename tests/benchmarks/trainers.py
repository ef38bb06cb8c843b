"""The two Trainers that take turns, whatever they train: Lightning's with our callbacks, and transformers'."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, Turns
from torch.utils.data import Dataset


def lightning_trainer(module: Any, data: Any, turns: Turns, units: str, **options: Any) -> None:
    """Train under Lightning as our commands do, with metrics.csv; never returns.

    Args:
        module: A LightningModule.
        data: Data module or loader.
        turns: What times the steps.
        units: Name of the batch's tensor whose elements are counted.
        options: Of the Trainer.
    """
    from lightning.pytorch import Callback, Trainer

    from experiment.runs.loggers import MetricsFile
    from experiment.runs.stopping import FiniteLoss

    class LightningTurns(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            turns.step(batch[units].numel(), outputs["loss"].detach().clone())

    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(
            accelerator=DEVICE,
            devices=1,
            max_steps=10**6,
            logger=MetricsFile(Path(run)),
            log_every_n_steps=turns.steps,
            callbacks=[FiniteLoss(), *options.pop("callbacks", []), LightningTurns()],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            **options,
        )
        trainer.fit(module, data)


def transformers_trainer(
    model: torch.nn.Module, rows: Dataset | list, turns: Turns, units: int, collator: Any = None, **arguments: Any
) -> None:
    """Train under transformers' Trainer as its examples do; never returns. Imports nothing of ours.

    Args:
        model: One of transformers'.
        rows: To train on.
        turns: What times the steps.
        units: Tokens or examples of a step.
        collator: Makes a batch of rows.
        arguments: Of the Trainer.
    """
    import transformers

    class TrainerTurns(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                turns.step(units * turns.steps, logs["loss"], turns.steps)

    with tempfile.TemporaryDirectory() as folder:
        given = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=DEVICE == "cpu",
            max_steps=10**6,
            logging_steps=turns.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        )
        trainer = transformers.Trainer(
            model=model, args=given, train_dataset=rows, data_collator=collator, callbacks=[TrainerTurns()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
