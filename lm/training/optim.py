"""Parameter groups, optimizers and the learning rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lm.model.decoder import Attention, SwiGLU


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization") and its learning rate.

    Attributes:
        learning_rate: The highest learning rate, reached after the warm-up.
        muon_learning_rate: If given, Muon (see muon.py) trains the blocks' matrices with this as its peak learning
            rate, and AdamW trains only embeddings, head and norms.
        weight_decay: Decay of the matrices; norms are never decayed.
        beta1: Decay of the running mean of gradients.
        beta2: Decay of the running mean of squared gradients.
        eps: Term added to the denominator.
        schedule: After the warm-up: ``constant``; ``cosine``, to final_ratio at the last step (Loshchilov & Hutter
            2017); or ``wsd`` (warm-up, stable, decay), constant, then linear over the last decay_fraction of the steps
            (Hu et al. 2024, MiniCPM).
        warmup_steps: Optimizer steps of linear warm-up from 0.
        final_ratio: Final learning rate divided by the highest.
        decay_fraction: Fraction of all steps in the decay phase of ``wsd``.
    """

    learning_rate: float = 6e-4
    muon_learning_rate: float | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    final_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        for names, valid, expected in (
            (("learning_rate", "muon_learning_rate", "eps"), lambda x: x is None or x > 0, "a number above 0"),
            (("beta1", "beta2"), lambda x: 0 <= x < 1, "a number from 0 to below 1"),
            (("final_ratio", "decay_fraction"), lambda x: 0 <= x <= 1, "a number from 0 to 1"),
            (("weight_decay", "warmup_steps"), lambda x: x >= 0, "0 or more"),
        ):
            for name in names:
                if not valid(getattr(self, name)):
                    raise ValueError(f"{name} {getattr(self, name)}: expected {expected}")


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """The trainable parameters in two groups: matrices with weight decay; vectors (norms, biases) without."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def block_matrices(module: nn.Module) -> list[dict]:
    """The matrices of a decoder's blocks in groups for Muon, with the heights of the stacked matrices."""
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    feed_forwards = [part for part in module.modules() if isinstance(part, SwiGLU)]
    return [
        {"params": [part.qkv.weight for part in attentions], "rows": attentions[0].rows},
        {"params": [part.gate_up.weight for part in feed_forwards], "rows": feed_forwards[0].rows},
        {"params": [part.out.weight for part in attentions] + [part.down.weight for part in feed_forwards]},
    ]


def make_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    fused: bool = True,
    products: torch.dtype = torch.float32,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, alone or together with Muon, over the module's parameters.

    Args:
        module: A decoder, or a module that contains one.
        config: The hyper-parameters.
        fused: Use AdamW's fused kernel.
        products: Type of Muon's matrix products.
        compiled: Compile Muon's matrix products.
    """
    matrices = [] if config.muon_learning_rate is None else block_matrices(module)
    taken = {parameter for group in matrices for parameter in group["params"]}
    adamw = torch.optim.AdamW(
        parameter_groups([p for p in module.parameters() if p not in taken], config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )
    if not matrices:
        return adamw
    from lm.training.muon import JointOptimizer, Muon

    rate, decay = config.muon_learning_rate, config.weight_decay
    return JointOptimizer(adamw, Muon(matrices, lr=rate, weight_decay=decay, dtype=products, compiled=compiled))


def learning_rate_factor(step: int, total_steps: float, config: OptimizerConfig) -> float:
    """The learning rate of a step divided by the highest. Our own: transformers' schedules start at 0, a wasted step.

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
