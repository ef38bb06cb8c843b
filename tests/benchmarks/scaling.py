"""The cost as the work grows: training speed by shape, and the loader by the size of its corpus.

    python tests/benchmarks/scaling.py [--only loader]

Writes runs/bench/scaling_training.csv and scaling_loader.csv, and a PNG of each.
"""

import argparse
import csv
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import BENCH, Worker, machine, own_memory

from experiment.console import console
from experiment.nn.hardware import fast_bfloat16
from lm.data.bpe import train_tokenizer
from lm.data.demo_stories import write_story
from lm.data.module import TextDataModule
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder
from lm.model.loss import linear_cross_entropy
from lm.training.optim import OptimizerConfig, make_optimizer

BASE = {"batch_size": 8, "length": 128, "num_layers": 6, "vocab_size": 32768}
SWEEPS = {
    "batch_size": (1, 2, 4, 8, 16, 32),
    "length": (32, 64, 128, 256, 512),
    "num_layers": (1, 2, 4, 8, 12),
    "vocab_size": (1024, 4096, 16384, 32768, 65536),
}
STORIES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
CHARACTERS = 160  # of a story: a million of them are 35 million tokens


def training_speed(batch_size: int, length: int, num_layers: int, vocab_size: int) -> float:
    """Tokens per second of forward, backward and optimizer step: the median of at least three steps."""
    torch.manual_seed(0)
    config = replace(DecoderConfig(), num_layers=num_layers, vocab_size=vocab_size, max_sequence_length=length)
    decoder = Decoder(config)
    optimizer = make_optimizer(decoder, OptimizerConfig())
    ids = torch.randint(vocab_size, (batch_size, length))
    targets, weights = ids.roll(-1).flatten(), torch.ones(ids.numel())
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds[1:]) < 1:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            hidden = decoder.hidden_states(ids).flatten(0, 1)
            loss = linear_cross_entropy(hidden, decoder.head_weight, targets, weights)
        (loss / ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return ids.numel() / statistics.median(seconds[1:])


def training() -> list[dict[str, float | str]]:
    rows = []
    for name, values in SWEEPS.items():
        for value in values:
            speed = round(training_speed(**{**BASE, name: value}), 1)
            rows.append({"varied": name, "value": value, "tokens_per_second": speed})
            console.print(f"{name} {value:,}: {speed:,.0f} tokens/s")
    return rows


def start(measured: Callable[..., None], folder: str, tokenizer: str) -> None:
    """How long the loader of a corpus takes to its first batch, and an epoch of it, in a process of its own."""
    os.environ["TINYLAB_CACHE"] = f"{folder}/cache"
    os.environ["HF_DATASETS_CACHE"] = f"{folder}/datasets"
    measured(None)
    begin = time.perf_counter()
    data = TextDataModule(folder, tokenizer, sequence_length=128, batch_size=32)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    next(iter(loader))
    seconds = time.perf_counter() - begin
    begin, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < 2:
        for batch in loader:
            tokens += int(batch["loss_mask"].sum())
    measured(tokens / spent, start=seconds, epoch_tokens=len(loader) * 32 * 128, own_memory=own_memory())


def loading() -> list[dict[str, float]]:
    draw = random.Random(0)
    pool = [write_story(draw)[:CHARACTERS].replace("\n", " ") for _ in range(2000)]
    rows = []
    with tempfile.TemporaryDirectory() as root:
        tokenizer = _train_tokenizer(pool, Path(root) / "tokenizer")
        for stories in STORIES:
            folder = Path(root) / str(stories)
            folder.mkdir()
            with (folder / "train.jsonl").open("w") as file:
                file.writelines(json.dumps({"text": f"{pool[i % 2000]} {i}"}) + "\n" for i in range(stories))
            (folder / "validation.jsonl").write_text(json.dumps({"text": pool[0]}) + "\n")
            told = []
            for _ in range(2):  # the first tokenises, the second finds that done: each in a process of its own
                with Worker(start, str(folder), tokenizer) as worker:
                    speed = worker()
                    told.append(worker.details)
            rows.append(
                {
                    "stories": stories,
                    "tokens": told[1]["epoch_tokens"],
                    "first_start_seconds": round(told[0]["start"], 2),
                    "second_start_seconds": round(told[1]["start"], 3),
                    "loader_tokens_per_second": round(speed),
                    "tokenising_memory_mib": round(told[0]["own_memory"]),
                    "own_memory_mib": round(told[1]["own_memory"]),
                    "peak_with_mapped_corpus_mib": round(told[1]["peak_memory"]),
                }
            )
            console.print(", ".join(f"{name} {value:,}" for name, value in rows[-1].items()))
    return rows


def _train_tokenizer(texts: list[str], folder: Path) -> str:
    train_tokenizer(texts, 1024).save(folder)
    return str(folder)


def write(rows: list[dict], name: str) -> None:
    BENCH.mkdir(parents=True, exist_ok=True)
    with (BENCH / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_training(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    base = ", ".join(f"{name} {value:,}" for name, value in BASE.items())
    figure.suptitle(f"Training speed around {base}\n{machine()}", fontsize=8)
    for axes, name in zip(figure.subplots(2, 2).flat, SWEEPS, strict=True):
        points = [(row["value"], row["tokens_per_second"]) for row in rows if row["varied"] == name]
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set(xlabel=name, ylabel="tokens/s", xscale="log", xticks=[x for x, _ in points], ylim=(0, None))
        axes.set_xticklabels([f"{x:,}" for x, _ in points])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.savefig(BENCH / "scaling_training.png", dpi=120)


def draw_loading(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(f"The loader by the size of its corpus\n{machine()}", fontsize=8)
    panels = {
        "first_start_seconds": ("first start (tokenises), s", "log"),
        "second_start_seconds": ("second start, s", "linear"),
        "loader_tokens_per_second": ("loader, tokens/s", "linear"),
        "own_memory_mib": ("memory without the mapped corpus, MiB", "linear"),
    }
    for axes, (name, (label, scale)) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axes.plot([row["stories"] for row in rows], [row[name] for row in rows], marker="o")
        axes.set(xlabel="stories", ylabel=label, xscale="log", yscale=scale)
        if scale == "linear":
            axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    figure.savefig(BENCH / "scaling_loader.png", dpi=120)


MEASURES = {"training": (training, draw_training), "loader": (loading, draw_loading)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES), help="What to measure.")
    only = parser.parse_args().only
    console.print(machine())
    for name in only:
        measure, draw = MEASURES[name]
        rows = measure()
        write(rows, f"scaling_{name}")
        draw(rows)


if __name__ == "__main__":
    main()
