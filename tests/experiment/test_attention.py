"""Attention with its gradient written out against torch's kernel in float32."""

import pytest
import torch
import torch.nn.functional as F

from experiment.nn.attention import LONGEST, attention

CASES = {
    "causal": {"causal": True},
    "grouped, causal": {"kv_heads": 2, "causal": True},
    "everywhere": {},
    "masked": {"masked": True},
    "grouped, masked": {"kv_heads": 1, "masked": True},
    "other length of keys": {"keys": 9},
}


def make_inputs(kv_heads: int = 4, keys: int = 7, length: int = 7, masked: bool = False, causal: bool = False):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, length, 16), (3, kv_heads, keys, 16), (3, kv_heads, keys, 16)
    tensors = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    mask = torch.rand(3, 1, 1, keys, generator=generator) < 0.7
    mask[..., 0] = True  # a row that may look nowhere has no softmax
    return tensors, (mask if masked else None), causal


def values_and_gradients(function, inputs):
    output = function(*inputs)
    return [output, *torch.autograd.grad(output.float().sin().sum(), inputs)]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_torchs_kernel_in_float32(case):
    inputs, mask, causal = make_inputs(**CASES[case])
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    ours = values_and_gradients(lambda *tensors: attention(*tensors, mask, causal), inputs)
    reference = values_and_gradients(
        lambda *tensors: F.scaled_dot_product_attention(*tensors, attn_mask=mask, is_causal=causal, enable_gqa=True),
        exact,
    )
    for left, right in zip(ours, reference, strict=True):
        assert left.dtype == torch.bfloat16
        assert (left - right).norm() <= 1e-2 * right.norm()


def test_what_is_hidden_has_no_influence_and_no_gradient():
    (query, key, value), mask, _ = make_inputs(masked=True)
    hidden = ~mask.expand(3, 4, 1, 7).transpose(2, 3)
    _, _, grad_key, grad_value = values_and_gradients(lambda *tensors: attention(*tensors, mask), (query, key, value))
    assert hidden.any()
    assert not (grad_key * hidden).any() and not (grad_value * hidden).any()
    changed = torch.where(hidden, 100.0, value)
    assert torch.equal(attention(query, key, value, mask), attention(query, key, changed, mask))


def test_inputs_of_different_types_under_autocast_stay_on_torchs_kernel():
    """As a layer gives them that multiplies its result by a number in float32."""
    query, key, value = make_inputs()[0]
    inputs = [query, key, value.detach().float().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        ours = values_and_gradients(attention, inputs)
        expected = values_and_gradients(F.scaled_dot_product_attention, inputs)
    for left, right in zip(ours, expected, strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 7), (torch.bfloat16, LONGEST + 1)])
def test_float32_and_long_sequences_stay_on_torchs_kernel(dtype, length):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in make_inputs(keys=length, length=length)[0]]
    expected = values_and_gradients(lambda *tensors: F.scaled_dot_product_attention(*tensors), inputs)
    for left, right in zip(values_and_gradients(attention, inputs), expected, strict=True):
        assert torch.equal(left, right)
