"""Muon: momentum whose every update is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

`torch.optim.Muon` computes the same in bfloat16 alone, one matrix after the other: on a CPU that emulates
bfloat16, its step takes longer than the forward and backward pass. Here the products are taken in the type that is fast
on the device, those of equal shape together, and matrices that the model keeps stacked (query, key and value) are
orthogonalised each by itself.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic whose iterates grow small singular values fastest; they end around 1, not at 1, which does no harm.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
Part = tuple[Tensor, Tensor, float]  # a weight, its gradient with momentum, the learning rate


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton-Schulz iteration towards `U V^T` of each matrix `U S V^T`.

    Args:
        matrices: (N, rows, columns) with rows <= columns.
        dtype: Of the products.

    Returns:
        (N, rows, columns) of dtype; singular values lie around 1.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, as the update of matrices; decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        """
        Args:
            params: Matrices, or groups of them. A group's ``rows`` names the heights of the matrices that each of its
                parameters is stacked from; None where it is one.
            lr: Learning rate; an update's singular values are about ``lr * sqrt(max(1, rows / columns))``.
            momentum: Decay of the running mean of gradients.
            weight_decay: Times the learning rate, the share of a weight that each step takes away.
            dtype: Of the products of the orthogonalisation; momentum stays in the parameter's own.
            compiled: Orthogonalise in code that torch.compile makes, once for each shape.

        Raises:
            ValueError: If a parameter is no matrix.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rows": None})
        self.dtype = dtype
        self._orthogonalize = torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)}: Muon moves matrices only")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # By shape, wide matrices and tall ones: what is done to all of a kind takes few kernels of a GPU.
        alike: dict[tuple[int, int], tuple[list[Part], list[Part]]] = defaultdict(lambda: ([], []))
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, means, group["momentum"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for parameter, update in zip(parameters, updates, strict=True):
                rows = group["rows"] or [len(parameter)]
                for weight, part in zip(parameter.split(rows), update.split(rows), strict=True):
                    height, width = part.shape
                    alike[min(height, width), max(height, width)][height > width].append((weight, part, group["lr"]))
        for wide, tall in alike.values():
            parts = [part for _, part, _ in wide] + [part.mT for _, part, _ in tall]
            updates = self._orthogonalize(torch.stack(parts), self.dtype).to(parts[0].dtype)
            _move(wide, updates[: len(wide)])
            _move(tall, updates[len(wide) :].mT.contiguous())
        return loss


def _move(parts: list[Part], updates: Tensor) -> None:
    """Take the updates (N, rows, columns) times their rates off the weights."""
    scale = max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
    for rate in {rate for _, _, rate in parts}:
        chosen = [i for i, (_, _, other) in enumerate(parts) if other == rate]
        moved = list(updates.unbind()) if len(chosen) == len(parts) else [updates[i] for i in chosen]
        torch._foreach_add_([parts[i][0] for i in chosen], moved, alpha=-rate * scale)


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one: Lightning's automatic optimization takes one only.

    Groups and state are the optimizers' own, so that schedules and checkpoints see all of them.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Hand groups and state, which loading replaces, to the optimizers."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
