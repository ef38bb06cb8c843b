"""Training the language model: our LightningModule and Trainer against transformers' Llama and Trainer.

Both start from the same weights and see the same tokens in the same batches, predict the same targets, move by the
same AdamW and clip to the same norm, so their losses agree step by step; `check_losses` sees to that.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ALLOCATOR, ROUNDS, Row, Turns, Worker, alternate, check_losses, make_row
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from transformers_training import LEARNING_RATE, Tokens, Work, transformers_trainer

from experiment.finite import FiniteLoss
from experiment.hardware import default_precision, fast_bfloat16
from experiment.metrics_file import MetricsFile
from experiment.quiet import quiet_libraries
from lm.callbacks import Throughput
from lm.module import LanguageModel
from lm.optim import OptimizerConfig

TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 2e-2}  # of the losses after some steps, in nats


class OurTokens(Tokens):
    """The same as our data module gives them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The last position has no target within the row; transformers leaves it out in the same way.
        weights = torch.ones(self.ids.shape[1])
        weights[-1] = 0
        return {"input_ids": self.ids[index], "targets": self.ids[index].roll(-1), "weights": weights}


class LightningTurns(Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.turns.step(batch["input_ids"].numel(), float(outputs["loss"]))


def tinylab(measured: Callable[..., None], work: Work) -> None:
    """Our training of the same decoder by AdamW, with its metrics.csv."""
    quiet_libraries()
    torch.manual_seed(0)
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", warmup_steps=0)
    module = LanguageModel(work.decoder, optimizer, compile=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_steps=10**6,
            precision=work.precision,
            gradient_clip_val=1.0,
            logger=MetricsFile(Path(folder)),
            log_every_n_steps=1,
            callbacks=[FiniteLoss(), Throughput(), LightningTurns(Turns(measured, work.steps, work.warmup))],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, DataLoader(OurTokens(work), batch_size=work.batch_size))


def compare(ours: Work, peer: Work, rounds: int = ROUNDS) -> tuple[dict[str, list[float]], dict[str, Any], str]:
    """Tokens per second of both, what their last measurement told, and what to say of their losses."""
    plain = dict.fromkeys(ALLOCATOR)
    with Worker(tinylab, ours) as a, Worker(transformers_trainer, peer, environment=plain) as b:
        speeds = alternate({"ours": a, "peer": b}, rounds)
        tolerance = max(TOLERANCE[work.precision] for work in (ours, peer))
        losses = check_losses(a.details["losses"], b.details["losses"], tolerance)
        return speeds, {"ours": a.details, "peer": b.details}, losses


def train_float32() -> list[Row]:
    """Ours at its default precision against transformers' default, and the memory of both."""
    default = default_precision()
    speeds, details, losses = compare(Work(precision=default), Work())
    memory = [[details[name]["peak_memory"]] for name in ("ours", "peer")]
    return [
        make_row("train_float32", speeds["ours"], speeds["peer"], "tokens/s", f"ours {default}, compiled; {losses}"),
        make_row("train_memory", *memory, "MiB", f"peak of the process; ours {default}", lower_is_better=True),
    ]


def train_bf16() -> list[Row]:
    """Both in bfloat16; where the processor has no instructions for it and emulates it, one row of the batch."""
    fast = fast_bfloat16()
    work = Work(precision="bf16-mixed") if fast else Work(precision="bf16-mixed", batch_size=1, steps=1, warmup=1)
    speeds, _, losses = compare(work, work)
    note = f"ours compiled; {losses}" if fast else f"no bf16 instructions, so a batch of 1; {losses}"
    return [make_row("train_bf16", speeds["ours"], speeds["peer"], "tokens/s", note)]
