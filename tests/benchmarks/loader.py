"""Tokens per second of the data loader alone, with nothing that trains on them. Run by hand:

python tests/benchmarks/loader.py [--path demo] [--tokenizer train] [--packing true] [--num_workers 0]
"""

import time

from common import machine
from jsonargparse import auto_cli

from lm.data.module import TextDataModule


def main(
    path: str = "demo",
    tokenizer: str = "train",
    vocab_size: int = 1024,
    sequence_length: int = 128,
    packing: bool = True,
    batch_size: int = 32,
    num_workers: int = 0,
    seconds: float = 5.0,
) -> None:
    """Goes through epochs of the training loader for some seconds and prints the tokens that count, per second."""
    data = TextDataModule(
        path, tokenizer, vocab_size, sequence_length, packing, batch_size=batch_size, num_workers=num_workers
    )
    data.setup("fit")
    loader = data.train_dataloader()
    next(iter(loader))  # maps the file and starts the workers
    tokens = places = 0
    begin = time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        for batch in loader:
            places += batch["loss_mask"].numel()
            tokens += int(batch["loss_mask"].sum())
    print(
        f"{tokens / spent:,.0f} tokens/s ({places / spent:,.0f} with pads): {path}, sequence_length {sequence_length}, "
        f"batch_size {batch_size}, packing {packing}, num_workers {num_workers}; {machine()}"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
