"""What stands between logits and a token: the likeliest, filters, and the penalty on repetition."""

import math

import torch
from torch import Tensor

NUCLEUS = 256  # tokens that are looked at first


def likeliest(logits: Tensor, block_size: int = 64) -> Tensor:
    """The token (B,) of the largest of logits (B, V), the first of equals; -1 where that is not finite.

    Of blocks first, since torch compares the elements of a row one by one, but takes the maxima of many short rows at
    the processor's full width.
    """
    if logits.shape[-1] % block_size:
        highest, token = logits.max(-1)
    else:
        blocks = logits.unflatten(-1, (-1, block_size))
        highest, block = blocks.amax(-1).max(-1)
        token = block * block_size + blocks[torch.arange(len(logits), device=logits.device), block].argmax(-1)
    return token.where(highest.isfinite(), -1)


def filter_logits(
    logits: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Logits (B, V) with -inf for every token that a filter excludes.

    The filters act in this order, each on the distribution that the one before left. At least the likeliest token
    stays.
    """
    if top_k is not None or top_p is not None:
        vocab_size = logits.shape[-1]
        kept = min(top_k or vocab_size, vocab_size)
        # A nucleus is small, and a whole vocabulary slow to sort: first the likeliest, which mostly hold it.
        for size in (min(NUCLEUS, kept), kept) if top_k is None else (kept,):
            ordered, order = logits.topk(size)
            if top_p is None:
                break
            total = (logits if top_k is None else ordered).float().logsumexp(-1, keepdim=True)
            probs = (ordered.float() - total).exp()
            if size == kept or (probs.sum(-1) > top_p + 1e-4).all():
                before = probs.cumsum(-1) - probs
                ordered = ordered.masked_fill((before >= top_p) & (before > 0), -math.inf)
                break
        logits = torch.full_like(logits, -math.inf).scatter(1, order, ordered)
    if min_p:
        border = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < border, -math.inf)
    return logits


def penalize_repetition(logits: Tensor, token_ids: list[list[int]], penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits (B, V) of the tokens that row b holds by the penalty."""
    logits = logits.clone()
    for row, ids in zip(logits, token_ids, strict=True):
        held = torch.tensor(sorted(set(ids)), device=row.device)
        row[held] = torch.where(row[held] > 0, row[held] / penalty, row[held] * penalty)
    return logits
