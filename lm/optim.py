"""Which parameters decay, which optimizer moves them, and how the learning rate goes over a run."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization") and its learning rate.

    Attributes:
        learning_rate: The highest learning rate, reached after the warm-up.
        weight_decay: Decay of the matrices; norms are never decayed.
        beta1: Decay of the running mean of gradients.
        beta2: Decay of the running mean of squared gradients.
        eps: Term added to the denominator.
        schedule: After the warm-up: ``constant``; ``cosine``, down to final_ratio at the last step (Loshchilov &
            Hutter 2017); or ``wsd`` (warm-up, stable, decay), constant and then down in a line over the last
            decay_fraction of the steps (Hu et al. 2024, MiniCPM).
        warmup_steps: Optimizer steps over which the learning rate rises in a line from 0.
        final_ratio: The last learning rate, as a share of the highest.
        decay_fraction: Share of all steps that the decay of ``wsd`` takes.
    """

    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    final_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number from 0 to below 1")
        for name in ("final_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number from 0 to 1")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 or more")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters in two groups: matrices, which decay, and vectors (norms, biases), which do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(module: nn.Module, config: OptimizerConfig, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW over the module's parameters; ``fused`` updates all of them in one kernel."""
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


def learning_rate_factor(step: int, total_steps: float, config: OptimizerConfig) -> float:
    """The learning rate of a step as a share of ``config.learning_rate``.

    Args:
        step: Optimizer steps done, from 0.
        total_steps: Optimizer steps of the whole run; only ``constant`` allows infinity.
        config: The schedule.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        start, last = config.warmup_steps, max(total_steps, config.warmup_steps + 1)
    else:
        start = max(total_steps * (1 - config.decay_fraction), config.warmup_steps)
        last = max(total_steps, start + 1)
    done = min(max((step - start) / (last - start), 0.0), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.final_ratio + (1 - config.final_ratio) * left
