"""Cross-entropy of a linear head without keeping the logits.

With a vocabulary of 32,768 the logits are the largest tensor of a small model by far: 32 x 128 tokens make 512 MiB
in float32, and autograd keeps several of that size. Here a chunk of rows at a time is turned into logits, losses and
both gradients in the forward pass, while it is hot in the cache; backward only scales what is already there. It is
the idea of Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009) and of Liger's kernel (Hsu et al. 2024,
arXiv:2410.10989) in plain torch, for every device. The price: a forward pass under grad costs the whole gradient
even if backward is never called, so evaluation uses `token_losses`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_SIZE = 256


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Tensor:
    """Sum over tokens of `weights * -log softmax(hidden @ weight.T)[target]`, differentiable in hidden and weight.

    Products are taken in the type of autocast where that is on, otherwise in the type of `hidden`; softmax, losses
    and the sum over chunks of the gradient of `weight` in float32 (float64 for float64).

    Args:
        hidden: (N, H) final hidden states.
        weight: (V, H) matrix of the head.
        targets: (N,) int64 in [0, V), also where the weight is 0.
        weights: (N,) float weight of each token; 0 ignores it. None weighs all 1. Not differentiated.
        chunk_size: Rows whose logits exist at one time; memory beyond the gradients is about 3 * chunk_size * V.

    Returns:
        The weighted sum, a scalar; divide by the sum of weights for a mean.

    Raises:
        ValueError: If the shapes do not fit or chunk_size is not positive.
    """
    _check(hidden, weight, targets, weights, chunk_size)
    if weights is not None and weights.device.type == "cpu":
        # Ignored tokens need no logits. On other devices finding them would make the host wait.
        counted = weights.nonzero().squeeze(1)
        if len(counted) < len(weights):
            hidden, targets, weights = hidden[counted], targets[counted], weights[counted]
    if not torch.is_grad_enabled():
        losses = token_losses(hidden, weight, targets, chunk_size)
        return losses.sum() if weights is None else (losses * weights).sum()
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, chunk_size)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int = DEFAULT_CHUNK_SIZE) -> Tensor:
    """`-log softmax(hidden @ weight.T)[target]` in nats of each token, (N,) in float32 (float64 for float64).

    Without gradient, for evaluation. Arguments, types and errors as in `linear_cross_entropy`.
    """
    _check(hidden, weight, targets, None, chunk_size)
    dtype = _product_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    weight = weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(len(hidden), chunk_size):
            logits = (hidden[rows].to(dtype) @ weight.T).to(wide)
            losses[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, chunk_size):
        dtype = _product_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        num_tokens, vocab_size = len(hidden), len(weight)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        losses = hidden.new_empty(num_tokens, dtype=wide)
        # Made once: buffers of this size freed in each round would be faulted in again in the next.
        size = min(chunk_size, num_tokens)
        logits_buffer = hidden.new_empty(size, vocab_size, dtype=wide)
        probs_buffer = torch.empty_like(logits_buffer)
        matrix = weight.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(num_tokens, chunk_size):
                inputs, target = hidden[rows].to(dtype), targets[rows, None]
                logits, probs = logits_buffer[: len(inputs)], probs_buffer[: len(inputs)]
                if dtype == wide:
                    torch.mm(inputs, matrix.T, out=logits)
                else:
                    logits.copy_(inputs @ matrix.T)
                torch.softmax(logits, dim=-1, out=probs)
                # log sum exp = max - log(largest probability), which cannot underflow: it is at least 1 / V.
                log_sum = logits.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
                losses[rows] = (log_sum - logits.gather(1, target)).squeeze(1)
                # Gradient of the logits, softmax minus one-hot. The weights of tokens are multiplied into the
                # thin (n, H) factors, which saves a pass over (n, V).
                gradient = probs.scatter_add_(1, target, probs.new_full((len(inputs), 1), -1.0)).to(dtype)
                scale = None if weights is None else weights[rows, None].to(dtype)
                if needs_hidden:
                    product = gradient @ matrix
                    grad_hidden[rows] = product if scale is None else product * scale
                if needs_weight:
                    factor = inputs if scale is None else inputs * scale
                    if dtype == wide:
                        grad_weight.addmm_(gradient.T, factor)
                    else:
                        grad_weight += gradient.T @ factor
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum() if weights is None else (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grads = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype


def _chunks(length: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least one row")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected (N, H) and (V, H); "
            "flatten batch and time"
        )
    for name, tensor in (("targets", targets), ("weights", weights)):
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} {tuple(tensor.shape)}: expected one for each of {len(hidden)} hidden states")
