"""What this CPU can do, and where a decoding step of many stories spends its time: what a ratio of `make bench` means.

    python tests/benchmarks/limits.py [--stories 32]

Prints the rate of the decoder's products as `F.linear` takes them (MKL, where torch is built with it; all that
transformers does) and as a matrix packed once by oneDNN, reading weights that no cache holds, and torch's profile.
MKL_VERBOSE=1 and ONEDNN_VERBOSE=1 tell which instructions the two use.
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
from lm.decoding.config import GenerationConfig
from lm.decoding.generation import generate
from lm.decoding.quantization import prepare

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


@torch.inference_mode()
def main(stories: int = 32) -> None:
    """Prints rates and a profile.

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
    decoder, prompts = prepare(make_decoder()), make_prompts(stories)
    config = GenerationConfig(max_new_tokens=100, temperature=0, compile=True)
    generate(decoder, prompts, config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generate(decoder, prompts, config)
    console.print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12), soft_wrap=True)
    console.print(machine())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
