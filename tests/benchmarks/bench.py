"""Ours against the libraries that people use otherwise, on this machine: `make bench`.

    python tests/benchmarks/bench.py [--only train_float32 help_time]

One process works at a time, contenders take turns in one run, and the medians of five rounds are compared. The table
and runs/bench/bench.json have the ratio of each row, above 1 where ours is better.
"""

import argparse
import importlib
import subprocess
import sys
import time

# Row, or what its rows' names begin with: the module and function that measure it. What it imports would count as the
# contenders' memory: import late.
ROWS = {
    "train_bf16": ("training", "train_bf16"),
    "train_float32": ("training", "train_float32"),
    "train_memory": ("training", "train_float32"),
    "train_loop": ("training", "train_loops"),
    "loss": ("training", "loss_rows"),
    "decode_float32": ("decoding", "rows"),
    "decode_bf16": ("decoding", "rows"),
    "decode_batch32": ("decoding", "rows"),
    "decode_llama_cpp": ("decoding", "llama_cpp_rows"),
    "decode_gpu": ("decoding", "gpu_rows"),
    "lora_bf16": ("lora", "lora_bf16"),
    "lora_default": ("lora", "lora_default"),
    "lora_gpu": ("lora", "lora_gpu"),
    "decoder_lora": ("decoder_lora", "rows"),
    "decoder_lora_gpu": ("decoder_lora", "gpu_rows"),
    "help_time": ("bench", "help_time"),
}


def help_time() -> list:
    """`python -m lm --help` against the import of LightningCLI alone; at most 1.5 times as long, a ratio of 0.67."""
    from common import alternate, make_row

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    contenders = {
        "ours": lambda: seconds("-m", "lm", "--help"),
        "peer": lambda: seconds("-c", "import lightning.pytorch.cli"),
    }
    alternate(contenders, 1)
    times = alternate(contenders)
    note = "python -m lm --help / import lightning.pytorch.cli"
    return [make_row("help_time", times["ours"], times["peer"], "s", note, lower_is_better=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="Rows to measure.")
    only = parser.parse_args().only

    from common import report

    rows, begin = [], time.perf_counter()
    for module, function in dict.fromkeys(ROWS[name] for name in only):
        measured = getattr(importlib.import_module(module), function)()
        rows += [row for row in measured if row.name.startswith(tuple(only))]
        report(rows)  # after each, so that nothing is lost with a later one
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
