"""The decoder with one part changed, for ablations (configs/comparisons/lm_ablation.yaml): `--model.variant.positions
none`. Variants train, evaluate and decode like the decoder; they cannot be exported.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.model.config import DecoderConfig, Variant
from lm.model.decoder import Block, Decoder, RMSNorm, SwiGLU


class UngatedFeedForward(SwiGLU):
    """`down(activation(up(x)))`, 1.5 times as wide as the SwiGLU it replaces."""

    def __init__(self, config: DecoderConfig, activation: str) -> None:
        super().__init__(config)
        self.rows = [config.intermediate_size * 3 // 2]
        self.gate_up = nn.Linear(config.hidden_size, self.rows[0], bias=False)  # the name that the optimizer expects
        self.down = nn.Linear(self.rows[0], config.hidden_size, bias=False)
        self.activation = {"silu": F.silu, "gelu": F.gelu}[activation]
        nn.init.normal_(self.gate_up.weight, std=0.02)
        nn.init.normal_(self.down.weight, std=0.02 / math.sqrt(2 * config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x)))


class PostNormBlock(Block):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def compute(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        mixed, value = self.attention(x, *context)
        x = self.attention_norm(x + self.dropout(mixed))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x))), value


class VariantDecoder(Decoder):
    """A decoder with the parts of a variant; shared parts have the same initial values."""

    def __init__(self, config: DecoderConfig, variant: Variant) -> None:
        super().__init__(config)
        self.variant, self.positions = variant, None
        if variant.norm_place == "post":
            self.norm = nn.Identity()
            for block in self.blocks:
                block.__class__ = PostNormBlock
        if variant.norm != "rms":
            for module in (self, *self.blocks):
                for name, part in list(module.named_children()):
                    if isinstance(part, RMSNorm):
                        layer = nn.LayerNorm(config.hidden_size, config.rms_norm_eps, bias=False)
                        setattr(module, name, layer if variant.norm == "layer" else nn.Identity())
        if variant.feed_forward != "swiglu":
            for block in self.blocks:
                block.feed_forward = UngatedFeedForward(config, variant.feed_forward)
        if variant.positions != "rotary":  # queries and keys are not rotated
            self.cos.fill_(1.0)
            self.sin.zero_()
        if variant.positions == "learned":
            self.positions = nn.Embedding(config.max_sequence_length, config.hidden_size)
            nn.init.normal_(self.positions.weight, std=0.02)
        if not variant.scaled_residuals:
            with torch.no_grad():
                for block in self.blocks:
                    block.attention.out.weight *= math.sqrt(2 * config.num_layers)
                    block.feed_forward.down.weight *= math.sqrt(2 * config.num_layers)

    def embed(self, input_ids: Tensor, positions: slice | Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.dropout(x if self.positions is None else x + self.positions.weight[positions])


def make_decoder(config: DecoderConfig, variant: Variant) -> Decoder:
    """The decoder itself if nothing is changed."""
    return VariantDecoder(config, variant) if variant.changed else Decoder(config)
