"""Gradient clipping that goes with fused optimizers."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def clip_gradients(module: LightningModule, clip_val: float | None, algorithm: str | None) -> Tensor | None:
    """What a LightningModule's ``configure_gradient_clipping`` should do: clip by norm, or by ``value``.

    Lightning refuses to clip for a fused optimizer under mixed precision, since a gradient scaler would not have
    unscaled the gradients yet; bfloat16 needs no scaler, so there is nothing to refuse.

    Args:
        module: Its gradients are clipped in place.
        clip_val: The largest norm of all gradients together, or the largest value; None or 0 clips nothing.
        algorithm: ``value``, or else the norm.

    Returns:
        The norm as it was before, where it was computed.
    """
    if not clip_val:
        return None
    if algorithm == "value":
        torch.nn.utils.clip_grad_value_(module.parameters(), clip_val)
        return None
    return torch.nn.utils.clip_grad_norm_(module.parameters(), clip_val)
