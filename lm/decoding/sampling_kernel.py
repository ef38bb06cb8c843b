"""`lm.decoding.sampling.sample` as one Triton kernel, for a GPU.

Each filter is a threshold: a token stays if it is at least that likely. The threshold is found by bisection over
float32 bit patterns, which sort like the numbers, counting the tokens above (top-k) or adding their
probabilities (top-p); nothing is sorted. The drawn token is found in the same way, by bisection over token
ids. A program holds a row's probabilities in registers and goes over them about fifty times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm.model.config import GenerationConfig

LARGEST = 65536  # tokens that fit into one program's registers
TOP_BITS = tl.constexpr(0x3F800000)  # of 1.0, the most likely token's probability over itself


@triton.jit
def _mass_from(probs, threshold):
    return tl.sum(tl.where(probs >= threshold, probs, 0.0), axis=0)


@triton.jit
def _sample(
    logits_pointer, draws_pointer, tokens_pointer, stride, inverse_temperature, top_p, min_p,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ID_BITS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    inside = ids < SIZE
    logits = tl.load(logits_pointer + row * stride + ids, mask=inside, other=-float("inf"))
    # Relative to the most likely token's; below 0 if there is no token, so that it passes no threshold.
    probs = tl.where(inside, tl.exp((logits - tl.max(logits, axis=0)) * inverse_temperature), -1.0)
    if TOP_K > 0:
        low = 0
        high = TOP_BITS
        while low < high:
            middle = low + (high - low + 1) // 2
            threshold = middle.to(tl.float32, bitcast=True)
            if tl.sum((probs >= threshold).to(tl.int32), axis=0) >= TOP_K:
                low = middle
            else:
                high = middle - 1
        probs = tl.where(probs >= low.to(tl.float32, bitcast=True), probs, -1.0)
    if TOP_P:
        low = 0
        high = TOP_BITS
        needed = top_p * _mass_from(probs, 0.0)
        while low < high:
            middle = low + (high - low + 1) // 2
            if _mass_from(probs, middle.to(tl.float32, bitcast=True)) >= needed:
                low = middle
            else:
                high = middle - 1
        probs = tl.where(probs >= low.to(tl.float32, bitcast=True), probs, -1.0)
    probs = tl.where(probs >= min_p, probs, 0.0)
    reached = tl.load(draws_pointer + row) * tl.sum(probs, axis=0)
    token = 0
    for bit in range(ID_BITS):  # the number of tokens whose cumulative sum does not exceed the draw
        next_token = token + (1 << (ID_BITS - 1 - bit))
        if tl.sum(tl.where(ids < next_token, probs, 0.0), axis=0) <= reached:
            token = next_token
    tl.store(tokens_pointer + row, tl.minimum(token, SIZE - 1).to(tl.int64))


def sample(logits: Tensor, draws: Tensor, config: "GenerationConfig") -> Tensor:
    """As `lm.decoding.sampling.sample`, for vocabularies of at most `LARGEST` tokens."""
    num_rows, vocab_size = logits.shape
    logits = logits.contiguous()
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(vocab_size)
    _sample[(num_rows,)](
        logits, draws.contiguous(), tokens, logits.stride(0),
        min(1 / config.temperature, torch.finfo(torch.float32).max), config.top_p or 1.0, config.min_p or 0.0,
        SIZE=vocab_size, BLOCK=block, ID_BITS=block.bit_length() - 1,
        TOP_K=min(config.top_k or 0, vocab_size), TOP_P=config.top_p is not None,
        num_warps=max(4, min(32, block // 1024)),
    )  # fmt: skip
    return tokens
