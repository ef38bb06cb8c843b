"""Muon: momentum with orthogonalized updates (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

`torch.optim.Muon` works in bfloat16 only and on one matrix at a time: on a CPU that emulates bfloat16 its step takes
longer than forward and backward. Here products are in the device's fast type, batched over matrices of equal shape, and
stacked matrices (query, key and value) are orthogonalized separately.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from experiment.compat.torch import foreach

# The quintic that grows small singular values fastest; they end near 1, not at 1, which is harmless.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
Part = tuple[Tensor, Tensor]  # a weight, its gradient with momentum


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newton-Schulz iteration towards `U V^T` of each matrix `U S V^T`.

    Args:
        matrices: (N, rows, columns) with rows <= columns.
        dtype: Of the products.

    Returns:
        (N, rows, columns) of dtype; singular values are near 1.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Updates matrices with orthogonalized Nesterov momentum and decoupled weight decay."""

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
            params: Matrices, or groups of them. A group's ``rows`` are the heights of the matrices that each of its
                parameters is stacked from; None for one matrix.
            lr: Learning rate; an update's singular values are about ``lr * sqrt(max(1, rows / columns))``.
            momentum: Decay of the running mean of gradients.
            weight_decay: Decoupled: a step removes the fraction lr * weight_decay of a weight.
            dtype: Type of the orthogonalization's products; momentum has the parameter's.
            compiled: Compile the orthogonalization, once per shape.

        Raises:
            ValueError: If a parameter is not a matrix.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rows": None})
        self.dtype = dtype
        self._orthogonalize = torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)}: Muon updates only matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # By rate and shape, wide and tall, so that a GPU needs few kernels.
        alike: dict[tuple[float, int, int], tuple[list[Part], list[Part]]] = defaultdict(lambda: ([], []))
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            foreach("lerp_", means, gradients, 1 - group["momentum"])
            updates = foreach("lerp", gradients, means, group["momentum"])
            foreach("mul_", parameters, 1 - group["lr"] * group["weight_decay"])
            for parameter, update in zip(parameters, updates, strict=True):
                rows = group["rows"] or [len(parameter)]
                for weight, part in zip(parameter.split(rows), update.split(rows), strict=True):
                    low, high = sorted(part.shape)
                    alike[group["lr"], low, high][len(part) > low].append((weight, part))
        for (rate, _, _), (wide, tall) in alike.items():
            parts = [part for _, part in wide] + [part.mT for _, part in tall]
            updates = self._orthogonalize(torch.stack(parts), self.dtype).to(parts[0].dtype)
            for moved, by in ((wide, updates[: len(wide)]), (tall, updates[len(wide) :].mT.contiguous())):
                if moved:
                    scale = max(1.0, by.shape[1] / by.shape[2]) ** 0.5
                    foreach("add_", [weight for weight, _ in moved], list(by.unbind()), alpha=-rate * scale)
        return loss


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, as Lightning's automatic optimization requires; groups and state are shared with
    them, so that schedules and checkpoints see all."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Reconnect the optimizers to their groups and state, which loading replaces."""
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
