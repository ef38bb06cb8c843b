"""Evaluation metrics of a language model."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenSums(Metric):
    """Sums over all tokens of a split, from which loss, perplexity and bits per byte follow.

    Losses are summed as integers, in units of 2^-20 nats: the sums do not depend on the order, the batch size or the
    number of devices, and need no float64, which some devices lack.
    """

    UNIT = 2.0**-20
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss", "tokens", "text_loss", "bytes", "not_finite"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor, loss_mask: Tensor, text_mask: Tensor, num_bytes: Tensor) -> None:
        """Add a batch.

        Args:
            losses: (N,) float, cross-entropy of each target in nats.
            loss_mask: (N,) bool, whether a target counts, as padding does not.
            text_mask: (N,) bool, whether it is text, as bos, eos and padding are not.
            num_bytes: (N,) integers, UTF-8 bytes of each target that is text.
        """
        finite = torch.isfinite(losses)
        self.not_finite += (~finite & loss_mask).sum()
        units = (torch.where(finite, losses.float(), 0.0) / self.UNIT).round().to(torch.int64)
        self.loss += (units * loss_mask).sum()
        self.tokens += loss_mask.sum()
        self.text_loss += (units * text_mask).sum()
        self.bytes += (num_bytes * text_mask).sum()

    def compute(self) -> dict[str, float]:
        """``loss`` in nats per token, ``perplexity`` = exp(loss), ``bits_per_byte`` of the text.

        NaN if any token's loss is not finite: the integer sums cannot represent it.
        """
        if self.not_finite:
            return dict.fromkeys(("loss", "perplexity", "bits_per_byte"), math.nan)
        loss = self.UNIT * self.loss.item() / max(self.tokens.item(), 1)
        bits = self.UNIT * self.text_loss.item() / math.log(2)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits / max(self.bytes.item(), 1)}
