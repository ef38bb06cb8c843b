"""What weights of fewer bits cost: perplexity of real stories under a trained model, by the format of its matrices.

    python tests/benchmarks/quantization.py --run runs/lm/stories260K --path ../shared/data/tinystories

The formats are those of `--model.generation.weight_dtype`; each story counts up to the model's context.
"""

import math
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from rich.table import Table

from experiment.console import console
from experiment.runs.reading import find_checkpoint
from experiment.sources.files import load_texts
from lm.decoding.quantization import WeightDtype, prepare_for_decoding
from lm.formats.pretrained import load_checkpoint


@torch.inference_mode()
def main(run: Path, path: str, stories: int = 300) -> None:
    """Prints the perplexity of validation stories by format.

    Args:
        run: Folder of a run of the language model.
        path: As --data.path: a folder with validation.*, or a hub name.
        stories: How many of them.
    """
    decoder, tokenizer = load_checkpoint(find_checkpoint(run))
    context = decoder.config.max_sequence_length
    texts = load_texts(path, "validation")["text"][:stories]
    rows = [torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)][:context]]) for text in texts]
    tokens = sum(row.numel() - 1 for row in rows)
    table = Table("weights", "perplexity", title=f"{len(rows)} stories, {tokens:,} tokens", title_justify="left")
    for weights in get_args(WeightDtype):
        prepared = prepare_for_decoding(decoder, weights)
        losses = [F.cross_entropy(prepared(row[:, :-1])[0], row[0, 1:], reduction="sum").item() for row in rows]
        table.add_row(weights, f"{math.exp(sum(losses) / tokens):.4f}")
    console.print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
