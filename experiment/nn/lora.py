"""LoRA in plain torch: low-rank adapters for any model made of `nn.Linear`.

A frozen layer `y = x W^T + b` gets a trainable update of low rank (Hu et al. 2021, https://arxiv.org/abs/2106.09685):

    y = x W^T + b + s (dropout(x) A^T) B^T      A: (r, in), B: (out, r), s = lora_alpha / r

B starts at zero, so training begins at the pretrained model; r (in + out) numbers are trained instead of
in x out. The product goes through the r-dimensional bottleneck: B A is never formed while training, and no
gradient is computed for W. Two optional variants:

- rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): s = lora_alpha / sqrt(r), so that the size of
  the update does not shrink as r grows.
- DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): W' = m (W + s B A) / ||W + s B A||, the norm
  taken over each output's row; m (out,) is trained and starts at ||W||. The norm counts as a constant in
  the gradient (their section 4.3).

    inject_lora(model, LoRAConfig(r=8, target_modules=["query", "key", "value"]))   # freezes everything else
    ...train...
    save_adapter(model, config, "adapter")      # by adapter_files.py, for PeftModel.from_pretrained(base, "adapter")
    merge(model)                                # replaces W by W': no cost at inference
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.nn.lora_config import LoRAConfig


def add_product(x: Tensor, middle: Tensor, weight: Tensor) -> Tensor:
    """x (..., out) + middle (..., r) weight (out, r)^T without allocating the product."""
    rows = x.reshape(-1, x.shape[-1]), middle.reshape(-1, middle.shape[-1])
    return torch.addmm(*rows, weight.T).view(x.shape)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: W' = W + (lora_alpha / r) B A.

    Args:
        base_layer: the layer to adapt, weight W (out, in); unchanged and frozen.
        config: rank, scale, dropout and variant.
        rows: the rows of the layer's matrix that form W if several matrices are stacked in it; by default all.

    Shapes: forward takes (..., in) and returns (..., out). `lora_A.weight` (r, in) is Kaiming-uniform,
    `lora_B.weight` (out, r) is zero, `lora_magnitude_vector` (out,) exists with DoRA only.

    Example:
        >>> layer = LoRALinear(nn.Linear(384, 384), LoRAConfig(r=8))
        >>> layer(torch.randn(2, 10, 384)).shape
        torch.Size([2, 10, 384])
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig, rows: slice | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.rows = slice(0, base_layer.out_features) if rows is None else rows
        self.scaling = config.scaling
        self.enabled = True
        self._base_weight: Tensor | None = None  # W itself, while the update is merged into base_layer
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        # Random numbers are drawn on the CPU and in PEFT's order (A, B, A again), so the same seed gives the same A.
        self.lora_A = nn.Linear(base_layer.in_features, config.r, bias=False)
        self.lora_B = nn.Linear(config.r, self.rows.stop - self.rows.start, bias=False)
        if config.init_lora_weights:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B.weight)
        self.lora_A.to(base_layer.weight)
        self.lora_B.to(base_layer.weight)
        self.register_parameter("lora_magnitude_vector", None)
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self._row_norm())

    @property
    def merged(self) -> bool:
        return self._base_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, self.base_layer(x))

    def adapt(self, x: Tensor, result: Tensor) -> Tensor:
        """The base layer's output (..., out) for x (..., in), plus the update."""
        if self.merged or not self.enabled:
            return result
        dropped = self.lora_dropout(x)
        update = self.lora_B(self.lora_A(dropped))
        if self.lora_magnitude_vector is None:
            return result + update * self.scaling  # in PEFT's order, for the same bits
        # y = m / ||W + s B A|| (x W^T + s x A^T B^T) + b, written as an addition to the base layer's result.
        # With dropout, PEFT also applies it to the input of the rescaled x W^T; so do we.
        scale = (self.lora_magnitude_vector / self._row_norm()).view(1, -1)
        if self.training and not isinstance(self.lora_dropout, nn.Identity):
            projected = F.linear(dropped, self.base_layer.weight[self.rows])
        else:
            projected = result if self.base_layer.bias is None else result - self.base_layer.bias[self.rows]
        return result + ((scale - 1) * projected + scale * update * self.scaling)

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (out, in): W + s B A, with DoRA rescaled row by row to the trained magnitudes."""
        weight = self._direction()
        if self.lora_magnitude_vector is not None:
            weight *= (self.lora_magnitude_vector / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
        return weight

    def merge(self) -> None:
        """Replace W by W'. Idempotent; keeps a copy of W to restore it."""
        if not self.merged:
            merged, weight = self.adapted_weight(), self.base_layer.weight.data[self.rows]
            self._base_weight = weight.clone()
            weight.copy_(merged)

    def unmerge(self) -> None:
        """Restore W, bit-identical. Idempotent."""
        if self.merged:
            self.base_layer.weight.data[self.rows].copy_(self._base_weight)
            self._base_weight = None

    def _direction(self) -> Tensor:
        weight = self._base_weight if self.merged else self.base_layer.weight[self.rows]
        return weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def _row_norm(self) -> Tensor:
        return torch.linalg.norm(self._direction(), dim=1)


class StackedLoRALinear(nn.Module):
    """A frozen linear layer of several stacked matrices, such as query, key and value, with a separate low-rank
    update for each or some of them.

    Args:
        base_layer: the layer, without bias.
        config: rank, scale, dropout and variant.
        rows: the number of rows of each matrix, by name, in order.
        adapted: the names of the adapted matrices; each becomes a `LoRALinear` of that name.
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig, rows: dict[str, int], adapted: list[str]) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.sizes = rows
        self.one_product = not (config.use_dora or config.lora_dropout)
        start = 0
        for name, size in rows.items():
            if name in adapted:
                self.add_module(name, LoRALinear(base_layer, config, slice(start, start + size)))
            start += size

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        parts = [getattr(self, name, None) for name in self.sizes]
        active = [part for part in parts if part is not None and part.enabled and not part.merged]
        if not active:
            return result
        if self.one_product:
            # All updates at once: stacked As, and Bs in a block-diagonal matrix.
            middle = F.linear(x, torch.cat([part.lora_A.weight for part in active])) * active[0].scaling
            blocks = [
                part.lora_B.weight if part in active else x.new_zeros(size, 0)
                for part, size in zip(parts, self.sizes.values(), strict=True)
            ]
            return add_product(result, middle, torch.block_diag(*blocks))
        pieces = result.split(list(self.sizes.values()), dim=-1)
        return torch.cat(
            [piece if part is None else part.adapt(x, piece) for part, piece in zip(parts, pieces, strict=True)], dim=-1
        )

    def adapted_weight(self) -> Tensor:
        """W' (out, in) of all its matrices."""
        weight = self.base_layer.weight.detach().clone()
        for part in self.children():
            if isinstance(part, LoRALinear):
                weight[part.rows] = part.adapted_weight()
        return weight


class LoRAEmbedding(nn.Module):
    """A frozen embedding with a trainable low-rank update: W' = W + s (B A)^T, as in PEFT.

    Args:
        base_layer: the embedding to adapt, weight W (tokens, width).
        config: rank and scale; dropout does not apply to an embedding.

    Shapes: `lora_embedding_A` (r, tokens) is zero, `lora_embedding_B` (width, r) normal.

    Raises:
        ValueError: config asks for DoRA.
    """

    def __init__(self, base_layer: nn.Embedding, config: LoRAConfig) -> None:
        super().__init__()
        if config.use_dora:
            raise ValueError("use_dora is for linear layers: leave the embedding out of target_modules")
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = config.scaling
        # Drawn in PEFT's order, though A is set to zero.
        a, b = torch.randn(config.r, base_layer.num_embeddings), torch.randn(base_layer.embedding_dim, config.r)
        if config.init_lora_weights:
            a.zero_()
            b.normal_()
        self.lora_embedding_A = nn.Parameter(a.to(base_layer.weight))
        self.lora_embedding_B = nn.Parameter(b.to(base_layer.weight))

    @property
    def weight(self) -> Tensor:
        """W (tokens, width), without the update: a tied head is not adapted."""
        return self.base_layer.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        update = F.embedding(input_ids, self.lora_embedding_A.T) @ self.lora_embedding_B.T
        return self.base_layer(input_ids) + update * self.scaling

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (tokens, width)."""
        return self.base_layer.weight + self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T
