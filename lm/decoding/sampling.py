"""From logits to a token: argmax, filters, repetition penalty, sampling."""

import functools
import math
from types import ModuleType

import torch
from torch import Tensor

from lm.model.config import GenerationConfig

NUCLEUS = 256  # most likely tokens, which are tried first
LARGEST_DRAW = 1 - 2**-22  # larger draws times a float32 sum could round up to the sum


def argmax(logits: Tensor, block_size: int = 64) -> Tensor:
    """Argmax ids (B,) of logits (B, V), the first on ties; -1 if the maximum is not finite.

    In two stages, because torch's argmax of a long row is scalar code, while maxima of short rows are vectorized.
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

    Filters apply in this order, each to the tokens left by the previous one; at least one token stays.
    """
    kept, ids = _filtered(logits, top_k, top_p, min_p)
    return kept if ids is None else torch.full_like(logits, -math.inf).scatter(1, ids, kept)


def _filtered(
    logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """The result of `filter_logits`: logits (B, n) and their ids (B, n), None for all ids in order."""
    ids = None
    if top_k is not None or top_p is not None:
        vocab_size = logits.shape[-1]
        most = min(top_k or vocab_size, vocab_size)
        # A nucleus is small and sorting a vocabulary slow: first try a few tokens; not on a GPU, which would wait.
        few_first = top_k is None and logits.device.type == "cpu"
        for size in (min(NUCLEUS, most), most) if few_first else (most,):
            ordered, ids = logits.topk(size)
            if top_p is None:
                break
            total = (logits if top_k is None else ordered).float().logsumexp(-1, keepdim=True)
            probs = (ordered.float() - total).exp()
            if size == most or (probs.sum(-1) > top_p + 1e-4).all():
                before = probs.cumsum(-1) - probs
                ordered = ordered.masked_fill((before >= top_p) & (before > 0), -math.inf)
                break
        logits = ordered
    if min_p:
        border = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < border, -math.inf)
    return logits, ids


def penalize_repetition(logits: Tensor, held: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits (B, V) by the penalty where `held` (B, V): tokens of the row."""
    return logits.where(~held, torch.where(logits > 0, logits / penalty, logits * penalty))


def choose(
    logits: Tensor, argmax: Tensor, draws: Tensor | None, held: Tensor | None, config: "GenerationConfig"
) -> Tensor:
    """The next token (B,) of each row; -1 where its logits are not finite.

    Without synchronization, and with control flow by the configuration only, so that a CUDA graph can capture it.

    Args:
        logits: (B, V), float32.
        argmax: (B,), of `argmax`.
        draws: (B,) random numbers in [0, `LARGEST_DRAW`]; None where temperature is 0.
        held: (B, V), True for tokens of the row; None without a penalty.
        config: Temperature, filters and penalty.
    """
    if config.repetition_penalty != 1:
        logits = penalize_repetition(logits, held, config.repetition_penalty)
    if config.temperature > 0:
        tokens = sample(logits, draws, config)
    elif config.repetition_penalty == 1:
        return argmax
    else:
        tokens = logits.argmax(-1)
    return tokens.where(argmax >= 0, -1)


def sample(logits: Tensor, draws: Tensor, config: "GenerationConfig") -> Tensor:
    """The token (B,) at which each row's cumulative distribution reaches its draw; arguments as in `choose`."""
    if logits.is_cuda and (kernel := _sampling_kernel()) is not None and logits.shape[-1] <= kernel.LARGEST:
        return kernel.sample(logits, draws, config)
    # The maximum is subtracted before dividing by the temperature, or a tiny one would overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    logits, ids = _filtered(logits, config.top_k, config.top_p, config.min_p)
    if ids is not None:  # sorted by id, so that a draw scans them in the same order for any filter
        ids, order = ids.sort(-1)
        logits = logits.gather(-1, order)
    cumulative = logits.softmax(-1).cumsum(-1)
    reached = draws[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, reached, right=True)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(1)


@functools.cache
def _sampling_kernel() -> ModuleType | None:
    """lm/decoding/sampling_kernel.py if Triton works on this GPU, which is tried."""
    try:
        from lm.decoding import sampling_kernel
        from lm.model.config import GenerationConfig

        sampling_kernel.sample(torch.zeros(1, 2, device="cuda"), torch.zeros(1, device="cuda"), GenerationConfig())
        torch.cuda.synchronize()
    except Exception:  # many kinds: no Triton, no C compiler for its launcher, a GPU that is too old
        return None
    return sampling_kernel
