"""The chunked loss against autograd through all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm.model.loss import linear_cross_entropy, token_losses


def make_inputs(num_tokens=37, hidden_size=16, vocab_size=101, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, dtype=dtype) * scale
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=dtype)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, generator=generator, dtype=dtype)
    weights[::4] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), targets, weights


def direct(hidden, weight, targets, weights):
    """The definition, with all logits."""
    losses = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    return (losses * weights).sum()


@pytest.fixture(params=[5, 2048, None])
def block_size(request, monkeypatch):
    """The vocabulary in many blocks, the last of them smaller, in one, and at once, as on a GPU."""
    if request.param is None:
        monkeypatch.setattr("lm.model.loss._on_cpu", lambda hidden: False)
    else:
        monkeypatch.setattr("lm.model.loss.BLOCK_SIZE", request.param)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("chunk_size", [1, 8, 28, 37, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_loss_and_gradients_equal_autograd(chunk_size, scale):
    inputs = make_inputs(scale=scale)
    expected = direct(*inputs)
    expected_grads = torch.autograd.grad(expected * 0.3, inputs[:2])
    loss = linear_cross_entropy(*inputs, chunk_size=chunk_size)
    grads = torch.autograd.grad(loss * 0.3, inputs[:2])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_pass_gradcheck_in_float64(weighted):
    hidden, weight, targets, weights = make_inputs(6, 4, 7, torch.float64)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, weights if weighted else None, chunk_size=4)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("needed", [0, 1])
def test_a_factor_that_needs_no_gradient_gets_none(needed):
    inputs = make_inputs()
    expected = torch.autograd.grad(direct(*inputs), inputs[needed])[0]
    inputs[1 - needed].requires_grad_(False)
    linear_cross_entropy(*inputs, chunk_size=8).backward()
    assert inputs[1 - needed].grad is None
    torch.testing.assert_close(inputs[needed].grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("block_size")
def test_a_token_as_unlikely_as_can_be_has_a_finite_loss():
    hidden, weight = torch.tensor([[300.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 600.0
    assert hidden.grad.item() == 2.0


@pytest.mark.usefixtures("block_size")
def test_ignored_tokens_change_nothing_whatever_they_hold():
    hidden, weight, targets, weights = make_inputs()
    spoiled = hidden.detach().clone()
    spoiled[weights == 0] = float("nan")
    spoiled.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, weights)
    spoiled_loss = linear_cross_entropy(spoiled, weight, targets, weights)
    assert torch.equal(loss, spoiled_loss)
    grads = torch.autograd.grad(loss, (hidden, weight))
    spoiled_grads = torch.autograd.grad(spoiled_loss, (spoiled, weight))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, spoiled_grads, strict=True))
    assert (grads[0][weights == 0] == 0).all()


@pytest.mark.usefixtures("block_size")
def test_a_batch_of_ignored_tokens_has_loss_and_gradients_of_zero():
    hidden, weight, targets, weights = make_inputs()
    loss = linear_cross_entropy(hidden, weight, targets, torch.zeros_like(weights))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_without_grad_the_sum_is_the_same():
    inputs = make_inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(*inputs, chunk_size=8)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(*inputs, chunk_size=8).detach())


@pytest.mark.parametrize("chunk_size", [1, 8, 1000])
def test_token_losses_equal_cross_entropy(chunk_size):
    hidden, weight, targets, _ = make_inputs()
    losses = token_losses(hidden, weight, targets, chunk_size)
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("block_size")
def test_bfloat16_autocast_stays_as_close_to_float32_as_autograd_does():
    hidden, weight, targets, weights = make_inputs(num_tokens=256, vocab_size=500, hidden_size=64, scale=0.3)
    exact = torch.autograd.grad(direct(hidden, weight, targets, weights), (hidden, weight))
    errors = {}
    for name, function in (("autograd", direct), ("ours", linear_cross_entropy)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(hidden, weight, targets, weights)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss.dtype == torch.float32
        assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
        errors[name] = [((grad - best).norm() / best.norm()).item() for grad, best in zip(grads, exact, strict=True)]
    assert all(ours < 1.5 * theirs for ours, theirs in zip(errors["ours"], errors["autograd"], strict=True)), errors
    assert all(ours > 1e-4 for ours in errors["ours"]), "products were not taken in bfloat16"


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_of_tokens_that_are_almost_certain_are_as_close_as_those_of_autograd(autocast):
    """Softmax minus one-hot is small there, and must not be lost in the rounding of a probability near 1."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(101, 64, generator=generator, requires_grad=True)
    targets = torch.randint(101, (64,), generator=generator)
    hidden = (weight.detach()[targets] * 0.25).requires_grad_()
    weights = torch.ones(64)
    exact_inputs = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*exact_inputs), targets, reduction="sum"), exact_inputs)
    errors = {}
    for name, function in (("autograd", direct), ("ours", linear_cross_entropy)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(hidden, weight, targets, weights)
        grads = torch.autograd.grad(loss, (hidden, weight))
        errors[name] = [((grad - best).norm() / best.norm()).item() for grad, best in zip(grads, exact, strict=True)]
    assert loss < 0.01 * len(targets)
    assert all(ours < 1.5 * theirs for ours, theirs in zip(errors["ours"], errors["autograd"], strict=True)), errors


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("autocast", [True, False])
def test_no_tensor_is_larger_than_a_chunk_of_logits(autocast):
    """Against a direct loss that makes all logits, so that the measure is known to see them."""
    num_tokens, vocab_size, chunk_size = 96, 501, 16
    inputs = make_inputs(num_tokens=num_tokens, vocab_size=vocab_size, hidden_size=8)
    largest = {}
    for name, function in (
        ("direct", direct),
        ("ours", lambda *inputs: linear_cross_entropy(*inputs, chunk_size=chunk_size)),
        ("token_losses", lambda *inputs: token_losses(*inputs[:3], chunk_size)),
    ):
        with LargestTensor() as record, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(*inputs).sum()
            if loss.requires_grad:
                loss.backward()
        largest[name] = record.elements
    assert largest["direct"] == num_tokens * vocab_size
    assert largest["ours"] == largest["token_losses"] == chunk_size * vocab_size


@pytest.mark.usefixtures("block_size")
def test_what_backward_keeps_is_no_larger_than_the_gradients():
    hidden, weight, targets, _ = make_inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        linear_cross_entropy(hidden, weight, targets, chunk_size=8)
    assert sum(kept) == hidden.numel() + weight.numel()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden": torch.zeros(2, 3, 16)}, "hidden"),
        ({"hidden": torch.zeros(37, 8)}, "hidden"),
        ({"targets": torch.zeros(36, dtype=torch.int64)}, "targets"),
        ({"weights": torch.zeros(37, 1)}, "weights"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, complaint):
    arguments = dict(zip(("hidden", "weight", "targets", "weights"), make_inputs(), strict=True))
    with pytest.raises(ValueError, match=complaint):
        linear_cross_entropy(**{**arguments, **change})
