"""The decoder's operations between its matrices; element-wise ones have manual gradients.

Autograd over the plain formulas saves every intermediate value and concatenates the gradients of split tensors by
copying. Here only inputs are saved, the rest is recomputed, and gradients are written in place: a fifth of a small
model's training memory. The values equal the plain formulas'.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Span:
    """The positions of the T tokens of one call, and what they may see."""

    positions: Tensor  # (1 or B, T) positions in the sequence
    mask: Tensor | None  # (1 or B, 1, T, visible), True where a token attends; None if `causal` suffices
    causal: bool


def story_span(positions: Tensor) -> Span:
    """The span of stories that share rows: a token sees only its own story; positions (B, T) restart at 0 in each."""
    places = torch.arange(positions.shape[1], device=positions.device)
    first = places - positions  # start of the token's story in the row
    mask = (places <= places[:, None]) & (places >= first[:, :, None])
    return Span(positions, mask[:, None], causal=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019), taken in float32."""
    return _call(_RMSNorm, x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of gate and up, concatenated in the last dimension (Shazeer 2020)."""
    return _call(_SwiGLU, gate_up)


def split_and_rotate(
    qkv: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, rotated by `rotate`, and value, each (B, T, heads, head_dim).

    Args:
        qkv: (B, T, num_heads + 2 num_kv_heads, head_dim).
        num_heads: Number of query heads, which come first in qkv.
        num_kv_heads: Heads of key and of value.
        cos: As in `rotate`.
        sin: As in `rotate`.
    """
    return _call(_SplitAndRotate, qkv, (num_heads, num_kv_heads, num_kv_heads), cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Rotate the pairs of x (B, T, heads, head_dim) by tables (1 or B, T, 1, head_dim) of `rotary_tables`."""
    half = x.shape[-1] // 2
    if torch.compiler.is_compiling():  # one kernel; in-place writes would make three
        return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin
    out = torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _call(function: type[torch.autograd.Function], *args: Any) -> Any:
    by_autograd_function = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return function.apply(*args) if by_autograd_function else function.forward(*args)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, eps):
        wide = x.float()
        return (wide * _inverse_root(wide, eps)).to(x.dtype) * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wide = x.float()
        scale = _inverse_root(wide, ctx.eps)
        normed = wide * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad * weight).float()
        inner = (grad_normed * normed).mean(-1, keepdim=True)
        return torch.addcmul(grad_normed, normed, inner, value=-1).mul_(scale).to(x.dtype), grad_weight, None


def _inverse_root(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(qkv, heads, cos, sin):
        query, key, value = qkv.split(heads, dim=2)
        # Value is copied, so that all of qkv need not be kept for it.
        return rotate(query, cos, sin), rotate(key, cos, sin), value.contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.heads, cos, sin = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key, grad_value):
        cos, sin = ctx.saved_tensors
        batch, length, _, head_dim = grad_query.shape
        grad_qkv = grad_query.new_empty(batch, length, sum(ctx.heads), head_dim)
        query, key, value = grad_qkv.split(ctx.heads, dim=2)
        rotate(grad_query, cos, -sin, out=query)  # the transpose of a rotation is its inverse
        rotate(grad_key, cos, -sin, out=key)
        value.copy_(grad_value)
        return grad_qkv, None, None, None
