"""What is in a batch of the language model, by the names that tests speak of."""

import torch


def unpacked(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With ``input_ids`` and ``targets`` (B, T), which are the tokens but the last, and but the first."""
    tokens = batch["tokens"].long()
    return batch | {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}
