"""Adapting a decoder of 15 M weights by LoRA of rank 8 on all linear layers: ours against PEFT and transformers'
Trainer, plain and compiled.

    python tests/benchmarks/bench.py --only decoder_lora         # on two cores
    python tests/benchmarks/bench.py --only decoder_lora_gpu     # on a GPU

All start from the same base and the same adapter, which is read from one folder, see the same stories in the same
batches and train the same number of weights; `training.compare` sees that their losses agree.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, ROUNDS, Row, make_row
from training import compare
from transformers_training import Work

from experiment.nn.hardware import fast_bfloat16
from experiment.nn.lora_config import LoRAConfig
from lm.data.module import TextDataModule
from lm.formats.adapters import inject, save_adapter
from lm.model.decoder import Decoder

SHARED = Path("../shared")
STORIES, TOKENIZER = SHARED / "data" / "tinystories", SHARED / "tokenizers" / "mistral-v3-32768"
ADAPTED = Work(learning_rate=3e-3)  # moves the loss by more than its tolerance, and not apart in bfloat16


def prepare(folder: str, work: Work) -> Work:
    """The work with an adapter and with real stories, or else the demo's, both written into the folder."""
    torch.manual_seed(0)
    decoder, lora = Decoder(work.decoder), LoRAConfig(r=8, lora_alpha=16)
    inject(decoder, lora)
    save_adapter(decoder, lora, f"{folder}/adapter")
    sources = (str(STORIES), str(TOKENIZER)) if SHARED.is_dir() else ("demo", "train")
    tokens = TextDataModule(*sources, vocab_size=work.decoder.vocab_size).corpus("validation").tokens
    np.save(f"{folder}/ids.npy", np.resize(tokens, (4096, work.length)).astype(np.int64))
    return replace(work, adapter=f"{folder}/adapter", ids_file=f"{folder}/ids.npy")


def measure(name: str, works: Iterable[Work], rounds: int = ROUNDS) -> list[Row]:
    """For each work a row of speeds and one of peak memory."""
    rows = []
    for work in works:
        title = f"{name}_{work.precision.split('-')[0]}_{work.batch_size}"
        with tempfile.TemporaryDirectory() as folder:
            work = prepare(folder, work)
            speeds, peer, memory, said = compare(work, work, rounds)
        note = f"ours compiled; {said}; {'real' if SHARED.is_dir() else 'embedded'} stories, {work.length} tokens a row"
        rows.append(make_row(title, speeds["ours"], speeds[peer], "tokens/s", note))
        note = f"peak; {', '.join(f'{n} {m:,.0f}' for n, m in memory.items())}"
        rows.append(make_row(f"{title}_memory", [memory["ours"]], [memory[peer]], "MiB", note, lower_is_better=True))
    return rows


def rows() -> list[Row]:
    """On a CPU, both in bfloat16, where it has instructions for that, and both in float32."""
    precisions = ("bf16-mixed", "32-true") if fast_bfloat16() else ("32-true",)
    return measure("decoder_lora", [replace(ADAPTED, precision=precision) for precision in precisions])


def gpu_rows() -> list[Row]:
    """On a GPU in bfloat16, with two sizes of batches."""
    sizes = (32, 512) if DEVICE == "cuda" else ()
    work = replace(ADAPTED, precision="bf16-mixed", steps=50, warmup=50)
    return measure("decoder_lora_gpu", [replace(work, batch_size=size) for size in sizes])
