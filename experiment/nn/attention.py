"""Attention of short sequences in bfloat16 on a CPU, with its gradient written out.

`scaled_dot_product_attention` is the fast kernel everywhere else; there, its backward pass in bfloat16 takes up to four
times as long as plain matrix products (one core with AVX512-BF16, 32 x 6 heads of 128 tokens: 70 ms forward and
backward against 18). Here the probabilities are kept for the backward pass, (batch, heads, T, S) of them, so this is
only for sequences of up to `LONGEST` tokens; float32, GPUs and evaluation use torch's kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 512  # tokens; doubling it would quadruple the probabilities


def uses_manual_backward(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` uses the manual gradient for these inputs; otherwise torch's kernel."""
    return (
        query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and torch.is_grad_enabled()
        and query.requires_grad
        and key.shape[2] <= LONGEST
    )


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """`softmax(query key^T / sqrt(head_dim)) value` (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    In the manual version, scores are rounded to bfloat16 before the softmax, which runs in float32.

    Args:
        query: (B, heads, T, head_dim).
        key: (B, kv_heads, S, head_dim), kv_heads divides heads: groups of queries share a key (arXiv:2305.13245).
        value: As key.
        mask: (1 or B, 1, 1 or T, S) bool, True where a token attends, at least once per row; None: everywhere.
        causal: Whether a token sees no later ones; only without a mask.

    Returns:
        (B, heads, T, head_dim).
    """
    if uses_manual_backward(query, key, value):
        return _Attention.apply(query, key, value, mask, causal)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, causal):
        batch, heads, length, head_dim = query.shape
        kv_heads, seen = key.shape[1:3]
        ctx.scale = head_dim**-0.5
        # Queries that share a key are stacked: (B kv_heads, group T, head_dim).
        rows = query.reshape(batch * kv_heads, -1, head_dim)
        keys, values = (x.reshape(batch * kv_heads, seen, head_dim) for x in (key, value))
        if causal:
            future = torch.full((length, seen), -torch.inf, dtype=query.dtype).triu_(1)
            scores = torch.baddbmm(future.repeat(heads // kv_heads, 1), rows, keys.mT, alpha=ctx.scale)
        else:
            scores = torch.bmm(rows * ctx.scale, keys.mT)
        if mask is not None:
            scores.view(batch, heads, length, seen).masked_fill_(~mask, -torch.inf)
        probs = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(rows, keys, values, probs)
        ctx.shapes = query.shape, key.shape
        return torch.bmm(probs, values).view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from experiment.compat.torch import softmax_backward

        rows, keys, values, probs = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        grad = grad.reshape(rows.shape)
        grad_value = torch.bmm(probs.mT, grad)
        grad_probs = torch.bmm(grad, values.mT)
        grad_scores = softmax_backward(grad_probs, probs)
        grad_query = torch.bmm(grad_scores, keys).mul_(ctx.scale)
        grad_key = torch.bmm(grad_scores.mT, rows).mul_(ctx.scale)
        return grad_query.view(query_shape), grad_key.view(key_shape), grad_value.view(key_shape), None, None
