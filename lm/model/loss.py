"""The loss of a batch, and cross-entropy of a linear head without keeping the logits.

With a vocabulary of 32,768 the logits are the largest tensor of a small model by far: 32 x 128 tokens make 512 MiB
in float32, and autograd keeps several of that size. Here losses and both gradients of one chunk of rows at a time are
computed in the forward pass; backward only scales them. It is the idea of Cut Your Losses (Wijmans et
al. 2024, arXiv:2411.09009) and of Liger's kernel (Hsu et al. 2024, arXiv:2410.10989) in plain torch, for every device.

On a CPU a chunk processes the vocabulary in blocks whose logits stay in the cache until their softmax has been
multiplied by the head's matrix; the blocks' sums are joined as in online softmax (Milakov & Gimelshein 2018,
arXiv:1805.02867). Rows of probabilities are kept for one chunk, since the gradient of the matrix needs the whole sum.
On a GPU such a block is too little work: there chunks are larger, and each uses the whole vocabulary at once.

The price: a forward pass under grad costs the whole gradient even if backward is never called, so evaluation uses
`token_losses`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_SIZE = 512  # rows; each chunk rereads the matrix and adds to all of its gradient
BLOCK_SIZE = 2048  # of the vocabulary
IGNORED = -100  # cross_entropy's ignore_index
GPU_CHUNK_SIZE = 4096  # rows; with the vocabulary of 32,768 half a GiB of logits in float32


def summed_loss(
    decoder: nn.Module, tokens: Tensor, loss_mask: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all tokens that count, in nats, and their number.

    Args:
        decoder: The model.
        tokens: (B, T + 1) of any integer type: T inputs and T targets, one later.
        loss_mask: (B, T) bool, whether a target counts.
        positions: (B, T) of the inputs, as in `Decoder.hidden_states`.
    """
    tokens = tokens.long()
    hidden = decoder.hidden_states(tokens[:, :-1], positions=positions).flatten(0, 1)
    targets, counted = tokens[:, 1:].flatten(), loss_mask.flatten()
    # torch.compile fuses cross_entropy into few kernels that read the logits once.
    if torch.compiler.is_compiling() or not has_plain_head(decoder):
        logits = decoder.logits(hidden).float()
        loss = F.cross_entropy(logits, targets.masked_fill(~counted, IGNORED), ignore_index=IGNORED, reduction="sum")
    else:
        loss = linear_cross_entropy(hidden, decoder.head_weight, targets, counted.float())
    return loss, counted.sum()


def has_plain_head(decoder: nn.Module) -> bool:
    """Whether the head is a plain matrix, without an adapter."""
    return decoder.head is None or isinstance(decoder.head, nn.Linear)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over tokens of `weights * -log softmax(hidden @ weight.T)[target]`, differentiable in hidden and weight.

    Products are taken in the type of autocast where that is on, otherwise in the type of `hidden`; softmax, losses
    and the sum over chunks of the gradient of `weight` in float32 (float64 for float64).

    Args:
        hidden: (N, H) final hidden states.
        weight: (V, H) matrix of the head.
        targets: (N,) int64 in [0, V), even if the weight is 0.
        weights: (N,) float weight of each token; 0 ignores it. None: all 1. Not differentiated.
        chunk_size: Rows whose probabilities exist at a time; memory beyond the gradients is little more than
            chunk_size * V numbers of the products' type on a CPU, with some of float32 beside them on a GPU.
            None: 512 on a CPU, 4,096 on a GPU.

    Returns:
        The weighted sum, a scalar; divide by the sum of weights for a mean.

    Raises:
        ValueError: If the shapes do not fit or chunk_size is not positive.
    """
    if chunk_size is None:
        chunk_size = CHUNK_SIZE if _on_cpu(hidden) else GPU_CHUNK_SIZE
    _check(hidden, weight, targets, weights, chunk_size)
    if not torch.is_grad_enabled():
        losses = token_losses(hidden, weight, targets, chunk_size)
        return losses.sum() if weights is None else (losses * weights).sum()
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, chunk_size)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """`-log softmax(hidden @ weight.T)[target]` in nats of each token, (N,) in float32 (float64 for float64).

    Without gradient, for evaluation. Arguments, types and errors as in `linear_cross_entropy`, except chunks half as
    large on a CPU.
    """
    if chunk_size is None:
        chunk_size = CHUNK_SIZE // 2 if _on_cpu(hidden) else GPU_CHUNK_SIZE
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
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(_product_dtype(hidden))
        wide = torch.promote_types(matrix.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        add_up = _vocabulary_blocks if _on_cpu(hidden) else _whole_vocabulary
        with torch.autocast(hidden.device.type, enabled=False):
            loss = add_up(hidden, matrix, targets, weights, chunk_size, grad_hidden, grad_weight)
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grads = [None if grad is None else grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _vocabulary_blocks(
    hidden: Tensor,
    matrix: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    chunk_size: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """The loss on a CPU; writes gradients to grad_hidden (N, H) and grad_weight (V, H) if given."""
    dtype, wide = matrix.dtype, torch.promote_types(matrix.dtype, torch.float32)
    # Sorted by target, so that few chunks have targets in a block; only tokens that count.
    order = targets.argsort(stable=True)
    if weights is not None:
        order = order[weights[order] != 0]
    num_tokens, vocab_size = len(order), len(matrix)
    loss = hidden.new_zeros((), dtype=wide)
    blocks = _chunks(vocab_size, BLOCK_SIZE)
    # Allocated once: if freed in each round, buffers of this size would be faulted in again.
    size = min(chunk_size, num_tokens)
    logits_buffer = hidden.new_empty(size * min(BLOCK_SIZE, vocab_size), dtype=wide)
    keeps = grad_weight is not None  # a chunk's probabilities; else each block overwrites those before it
    probs_buffer = hidden.new_empty(size * (vocab_size if keeps else min(BLOCK_SIZE, vocab_size)), dtype=dtype)
    for chunk in _chunks(num_tokens, chunk_size):
        rows = order[chunk]
        inputs, target = hidden[rows].to(dtype), targets[rows].unsqueeze(1)
        count = len(inputs)
        log_sum = hidden.new_full((count, 1), -torch.inf, dtype=wide)  # log sum exp of the blocks so far
        target_logit = torch.zeros_like(log_sum)
        # Of all tokens but the target: the sum of their probabilities, and of their rows by these.
        others, other_rows = torch.zeros_like(log_sum), torch.zeros_like(inputs, dtype=wide)
        parts = []
        for block, holders in zip(blocks, _holders(target, blocks), strict=True):
            shape = count, block.stop - block.start
            logits = logits_buffer[: shape[0] * shape[1]].view(shape)
            begin = count * block.start if keeps else 0
            probs = probs_buffer[begin : begin + shape[0] * shape[1]].view(shape)
            if dtype == wide:
                torch.mm(inputs, matrix[block].T, out=logits)
                largest = torch.softmax(logits, dim=-1, out=probs).amax(-1, keepdim=True)
            else:
                logits.copy_(inputs @ matrix[block].T)
                exact = torch.softmax(logits, dim=-1)
                largest = exact.amax(-1, keepdim=True)
                probs.copy_(exact)
            # log sum exp = max - log(largest probability), which cannot underflow: it is at least 1 / V.
            log_part = logits.amax(-1, keepdim=True) - largest.log()
            if keeps:
                parts.append((block, probs, log_part))
            mass = torch.ones_like(log_sum)
            if holders.start < holders.stop:
                # Without the target: its probability minus 1 would be lost to rounding near 1.
                place = target[holders] - block.start
                target_logit[holders] = logits[holders].gather(1, place)
                mass[holders] = probs[holders].scatter_(1, place, 0).sum(-1, keepdim=True, dtype=wide)
            before, log_sum = log_sum, torch.logaddexp(log_sum, log_part)
            old, new = (before - log_sum).exp_(), (log_part - log_sum).exp_()
            others.mul_(old).addcmul_(mass, new)
            if grad_hidden is not None:
                other_rows.mul_(old).addcmul_(probs @ matrix[block], new)
        # The gradient of the logits is softmax minus one-hot. Token weights, and the factors that turn a block's
        # softmax into the global one, are multiplied into thin (n, H) matrices: no extra pass over (n, V).
        scale = 1.0 if weights is None else weights[rows].unsqueeze(1).to(wide)
        loss += ((log_sum - target_logit) * scale).sum()
        if grad_hidden is not None:
            grad_hidden[rows] = ((other_rows - matrix[target[:, 0]] * others) * scale).to(hidden.dtype)
        if keeps:
            factor = inputs * scale
            for block, probs, log_part in parts:
                part = factor * (log_part - log_sum).exp_()
                if dtype == wide:
                    grad_weight[block].addmm_(probs.T, part)
                else:
                    grad_weight[block] += probs.T @ part.to(dtype)
            grad_weight.index_add_(0, target[:, 0], factor * others, alpha=-1)
    return loss


def _whole_vocabulary(
    hidden: Tensor,
    matrix: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    chunk_size: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> Tensor:
    """As `_vocabulary_blocks`, on a GPU: few kernels, all deterministic, no synchronization."""
    dtype, wide = matrix.dtype, torch.promote_types(matrix.dtype, torch.float32)
    loss = hidden.new_zeros((), dtype=wide)
    for rows in _chunks(len(targets), chunk_size):
        inputs, target = hidden[rows], targets[rows].unsqueeze(1)
        if weights is not None:  # an ignored token may be nan, and nan times 0 is nan
            scale = weights[rows].unsqueeze(1).to(wide)
            inputs = inputs.masked_fill(scale == 0, 0)
        inputs = inputs.to(dtype)
        logits = (inputs @ matrix.T).to(wide)
        log_sum = logits.logsumexp(-1, keepdim=True)
        losses = log_sum - logits.gather(1, target)
        probs = logits.sub_(log_sum).exp_().scatter_(1, target, 0)
        # The target's logit gradient, softmax minus 1, computed from the others: softmax may round to 1.
        probs.scatter_(1, target, -probs.sum(-1, keepdim=True))
        if weights is not None:
            losses, probs = losses * scale, probs.mul_(scale)
        loss += losses.sum()
        probs = probs.to(dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = (probs @ matrix).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight += probs.T @ inputs
    return loss


def _on_cpu(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu"


def _holders(target: Tensor, blocks: list[slice]) -> list[slice]:
    """For each block, the rows whose target (n, 1), sorted, is in it."""
    ends = torch.tensor([block.stop for block in blocks])
    stops = torch.searchsorted(target[:, 0].contiguous(), ends).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


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
