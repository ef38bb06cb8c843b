"""The operations with written-out gradients against autograd over their formulas."""

import pytest
import torch
import torch.nn.functional as F

from lm.model.decoder import rotary_tables
from lm.model.functional import rms_norm, split_and_rotate, swiglu


def plain_rms_norm(x, weight):
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).to(x.dtype) * weight


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def tables(dtype):
    return [table[:, None].to(dtype) for table in rotary_tables(7, 8, 100.0)]


def plain_split_and_rotate(qkv):
    cos, sin = tables(qkv.dtype)
    turned, value = qkv[:, :, :6], qkv[:, :, 6:]
    turned = turned * cos + turned.roll(4, dims=-1) * sin
    return turned[:, :, :4], turned[:, :, 4:], value


CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), plain_rms_norm, [(3, 7, 16), (16,)]),
    "swiglu": (swiglu, plain_swiglu, [(3, 7, 20)]),
    "split_and_rotate": (
        lambda qkv: split_and_rotate(qkv, 4, 2, *tables(qkv.dtype)), plain_split_and_rotate, [(3, 7, 8, 8)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_equal_autograd(name, dtype, tolerance):
    ours, plain, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    results = []
    for function in (ours, plain):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = torch.autograd.grad([output.float().sin().sum() for output in outputs], inputs)
        results.append([*outputs, *grads])
    with torch.no_grad():
        alone = ours(*inputs)
    results[0].extend(alone if isinstance(alone, tuple) else (alone,))
    results[1].extend(results[1][: len(results[0]) - len(results[1])])
    for left, right in zip(*results, strict=True):
        assert left.dtype == right.dtype == dtype
        assert (left - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("name", CASES)
def test_no_more_is_kept_than_the_inputs(name):
    ours, _, shapes = CASES[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        ours(*inputs)
    assert sum(kept) <= sum(tensor.numel() for tensor in inputs)
