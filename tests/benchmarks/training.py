"""Training the language model: our LightningModule and Trainer against transformers' Llama and Trainer, and against
compiled models in plain loops.

Both start from the same weights and see the same tokens in the same batches, predict the same targets, move by the
same AdamW and clip to the same norm, so their losses agree step by step; `check_losses` sees to that.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec

import torch
import torch.nn.functional as F
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
    left_out,
    make_row,
)  # fmt: skip
from compiled_loop import compiled_loop
from torch.utils.data import DataLoader
from trainers import lightning_trainer
from transformers_training import Tokens, Work, told, train_llama

from experiment.nn.hardware import default_precision, fast_bfloat16
from experiment.quiet import quiet_libraries
from experiment.runs.throughput import Throughput
from lm.model.config import DecoderConfig
from lm.model.loss import linear_cross_entropy
from lm.training.module import LanguageModel
from lm.training.optim import OptimizerConfig

TOLERANCE = {"32-true": 1e-3, "bf16-mixed": 2e-2}  # of the losses after some steps, in nats


class OurTokens(Tokens):
    """The same as our data module gives them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The last position has no target within the row; transformers leaves it out in the same way.
        tokens = torch.nn.functional.pad(self.ids[index].int(), (0, 1))
        return {"tokens": tokens, "loss_mask": torch.arange(len(tokens) - 1) < len(tokens) - 2}


def tinylab(measured: Callable[..., None], work: Work) -> None:
    """Our training of the same decoder, or of an adapter of it, by AdamW, with its metrics.csv."""
    quiet_libraries()
    torch.manual_seed(0)
    optimizer = OptimizerConfig(learning_rate=work.learning_rate, schedule="constant", warmup_steps=0)
    adapter = "full" if work.adapter is None else "lora"
    module = LanguageModel(work.decoder, optimizer, compile=True, adapter=adapter, adapter_weights=work.adapter)
    turns = Turns(told(measured, module), work.steps, work.warmup)
    loader = DataLoader(OurTokens(work), batch_size=work.batch_size)
    options = {"precision": work.precision, "gradient_clip_val": 1.0, "callbacks": [Throughput()]}
    lightning_trainer(module, loader, turns, "loss_mask", **options)


def compare(ours: Work, peer: Work, rounds: int = ROUNDS) -> tuple[dict[str, list[float]], str, dict[str, float], str]:
    """Tokens per second of ours and of the Trainer, plain and compiled; which of these is the faster; the peak memory
    of all; and what to say of their losses."""
    plain, names = dict.fromkeys(ALLOCATOR), ("Trainer", "Trainer compiled")
    with (
        Worker(tinylab, ours) as a,
        Worker(train_llama, peer, environment=plain) as b,
        Worker(train_llama, peer, True, environment=plain) as c,
    ):
        workers = {"ours": a, **dict(zip(names, (b, c), strict=True))}
        speeds = alternate(workers, rounds)
        tolerance = max(TOLERANCE[work.precision] for work in (ours, peer))
        losses = check_losses(a.details["losses"], b.details["losses"], tolerance)
        check_losses(a.details["losses"], c.details["losses"], tolerance)
        assert len({worker.details["trained"] for worker in workers.values()}) == 1
        memory = {name: worker.details["peak_memory"] for name, worker in workers.items()}
    return speeds, fastest(speeds, names), memory, f"{beside(speeds, names)}; {losses}"


def train_float32() -> list[Row]:
    """Ours at its default precision against transformers' default, and the memory of both."""
    default = default_precision()
    speeds, peer, memory, note = compare(Work(precision=default), Work())
    note = f"ours {default}, compiled; {note}"
    memory_note = f"peak of the process; ours {default}; {', '.join(f'{n} {m:,.0f}' for n, m in memory.items())}"
    return [
        make_row("train_float32", speeds["ours"], speeds[peer], "tokens/s", note),
        make_row("train_memory", [memory["ours"]], [memory[peer]], "MiB", memory_note, lower_is_better=True),
    ]


def bf16_work() -> tuple[Work, str]:
    """In bfloat16; one row of the batch where the CPU has no instructions for it and emulates it."""
    if fast_bfloat16():
        return Work(precision="bf16-mixed"), "ours compiled"
    return Work(precision="bf16-mixed", batch_size=1, steps=1, warmup=1), "no bf16 instructions, so a batch of 1"


def train_bf16() -> list[Row]:
    """All in bfloat16."""
    work, note = bf16_work()
    speeds, peer, _, said = compare(work, work)
    return [make_row("train_bf16", speeds["ours"], speeds[peer], "tokens/s", f"{note}; {said}")]


def train_loops() -> list[Row]:
    """Ours against compiled models in loops that do nothing else: our decoder, and litgpt's where it is installed."""
    work, note = bf16_work()
    plain = dict.fromkeys(ALLOCATOR)
    with ExitStack() as stack:
        workers = {
            "ours": stack.enter_context(Worker(tinylab, work)),
            "our decoder": stack.enter_context(Worker(compiled_loop, work, environment=plain)),
        }
        if find_spec("litgpt") is None:
            left_out("litgpt", "pip install --no-deps litgpt")
        else:
            workers["litgpt"] = stack.enter_context(Worker(compiled_loop, work, "litgpt", environment=plain))
        speeds = alternate(workers)
        losses = [workers[name].details["losses"] for name in ("ours", "our decoder")]
        note += f"; {check_losses(*losses, TOLERANCE[work.precision])} with our decoder"
    names = {"our decoder": "train_loop_decoder", "litgpt": "train_loop_litgpt"}
    return [
        make_row(row, speeds["ours"], speeds[name], "tokens/s", f"plain loop, {name} whole under torch.compile; {note}")
        for name, row in names.items()
        if name in speeds
    ]


def loss_rows() -> list[Row]:
    """lm/model/loss.py against torch's own chunked loss: loss and both gradients of a batch of 32 x 128 tokens."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        left_out("torch's linear_cross_entropy", f"torch {torch.__version__} has none, 2.13 has")
        return []
    config, fast = DecoderConfig(), fast_bfloat16()
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(size, config.hidden_size, generator=generator).to(DEVICE).requires_grad_()
        for size in (32 * 128, config.vocab_size)
    )
    targets = torch.randint(config.vocab_size, (len(hidden),), generator=generator).to(DEVICE)
    options = torch.nn.LinearCrossEntropyOptions()

    def theirs() -> torch.Tensor:
        h, w = (x.bfloat16() if fast else x for x in (hidden, weight))  # it takes no autocast
        return F.linear_cross_entropy(h, w, targets, reduction="sum", options=options)

    def ours() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=fast):
            return linear_cross_entropy(hidden, weight, targets)

    def measure(loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
        def once() -> float:
            hidden.grad = weight.grad = None
            begin = time.perf_counter()
            loss().backward()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return len(hidden) / (time.perf_counter() - begin)

        return once

    contenders = {"ours": measure(ours), "torch": measure(theirs)}
    gradients = []
    for once in contenders.values():
        once()
        gradients.append(weight.grad.clone())
    difference = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
    speeds = alternate(contenders)
    note = f"{'bf16' if fast else 'float32'} products, loss and gradients; gradients differ by {difference:.1g}"
    return [make_row("loss", speeds["ours"], speeds["torch"], "tokens/s", note)]
