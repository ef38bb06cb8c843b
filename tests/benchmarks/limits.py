"""What this CPU can do, and where a decoding step of many stories spends its time: what a ratio of `make bench` means.

    python tests/benchmarks/limits.py [--stories 32]

Prints how fast the matrix products of a training step can be, which bounds every ratio in training, the rate of the
decoder's products as `F.linear` takes them (MKL, where torch is built with it; all that transformers does) and as a
matrix packed once by oneDNN, reading weights that no cache holds, and torch's profile. MKL_VERBOSE=1 and
ONEDNN_VERBOSE=1 tell which instructions the two use.
"""

import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import machine
from decoding import make_decoder, make_prompts
from jsonargparse import auto_cli
from rich.table import Table

from experiment.console import console
from lm.decoding.generation import generate
from lm.decoding.quantization import prepare_for_decoding
from lm.model.config import GenerationConfig

SHAPES = {"head": (32768, 288), "qkv": (864, 288), "out": (288, 288), "gate_up": (1536, 288), "down": (288, 768)}
BEYOND_CACHE = 400e6  # bytes


def seconds(function: Callable[[], object], times: int) -> float:
    """Of one call, the best of five rounds."""
    function()
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(times):
            function()
        best = min(best, (time.perf_counter() - begin) / times)
    return best


def training_bound(tokens: int = 4096, layers: int = 6) -> None:
    """Prints the rates of a training step's products in bfloat16, forward and both gradients, and what they add up to
    for a batch: no training of this decoder on this CPU takes less."""
    table = Table("bfloat16 product", "forward GFLOP/s", "gradient of x", "gradient of the matrix")
    least = 0.0
    for name, (rows, width) in SHAPES.items():
        matrix = torch.randn(min(rows, 2048), width).bfloat16()  # the head is taken in blocks
        x, grad = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, len(matrix)).bfloat16()
        cells = []
        for product in (
            lambda x=x, matrix=matrix: x @ matrix.T,
            lambda grad=grad, matrix=matrix: grad @ matrix,
            lambda grad=grad, x=x: grad.T @ x,
        ):
            duration = seconds(product, 4)
            cells.append(f"{2 * tokens * matrix.numel() / duration / 1e9:,.0f}")
            least += duration * rows / len(matrix) * (1 if name == "head" else layers)
        table.add_row(name, *cells)
    console.print(
        table, f"products of a batch of {tokens:,} tokens: {least:.3f} s, {tokens / least:,.0f} tokens/s at best"
    )


@torch.inference_mode()
def main(stories: int = 32) -> None:
    """Print rates and a profile.

    Args:
        stories: How many are decoded at a time.
    """
    product = torch.randn(2048, 2048)
    for dtype in (torch.float32, torch.bfloat16):
        matrix = product.to(dtype)
        rate = 2 * 2048**3 / seconds(lambda matrix=matrix: matrix @ matrix, 2) / 1e9
        console.print(f"2048 x 2048 x 2048 in {dtype}: {rate:,.0f} GFLOP/s")
    table = Table("product", "rows", "F.linear GB/s", "GFLOP/s", "oneDNN packed GB/s", "GFLOP/s")
    for (name, shape), rows in itertools.product(SHAPES.items(), (1, stories)):
        size = 4 * shape[0] * shape[1]
        copies = [torch.randn(shape) for _ in range(int(BEYOND_CACHE / size) + 1)]
        packed = [torch.ops.mkldnn._reorder_linear_weight(copy) for copy in copies]
        x, flops, cells = torch.randn(rows, shape[1]), 2 * rows * shape[0] * shape[1], []
        for call in (
            lambda weight, x=x: F.linear(x, weight),
            lambda weight, x=x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
        ):
            turn = itertools.cycle(copies if not cells else packed)
            duration = seconds(lambda call=call, turn=turn: call(next(turn)), len(copies))
            cells += [f"{size / duration / 1e9:.1f}", f"{flops / duration / 1e9:.0f}"]
        table.add_row(name, str(rows), *cells)
    console.print(table)
    training_bound()
    decoder, prompts = prepare_for_decoding(make_decoder()), make_prompts(stories)
    config = GenerationConfig(max_new_tokens=100, temperature=0, compile=True)
    generate(decoder, prompts, config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generate(decoder, prompts, config)
    console.print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12), soft_wrap=True)
    console.print(machine())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
