"""The decoder: a LLaMA-style transformer in plain torch.

Architecture (Touvron et al. 2023, arXiv:2302.13971): pre-norm blocks of RMSNorm, causal attention with rotary positions
and grouped key-value heads, and SwiGLU; no biases. Equal to `transformers.LlamaForCausalLM` weight for weight: a rotary
pair is element i of each half of a head (Hugging Face's layout), not two neighbors (Meta's and llama2.c's).

Only the implementation differs: query, key and value share one matrix (`qkv`), as do gate and up
(`gate_up`), for fewer and larger products; and the operations between them (`lm.model.functional`) have manual
gradients that need less memory.

Training calls `scaled_dot_product_attention` with `is_causal` and no mask, and has dropout on the residual branches
only, to stay on the fused kernel of every device (bfloat16 on a CPU: see experiment/nn/attention.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experiment.nn.attention import attention
from lm.model.config import DecoderConfig
from lm.model.functional import Span, rms_norm, split_and_rotate, story_span, swiglu

if TYPE_CHECKING:
    from lm.model.kv_cache import KeyValueCache


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, arXiv:1910.07467), taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of rotary angles (Su et al. 2021, arXiv:2104.09864), each (length, head_dim).

    Pair i of a head, elements i and i + head_dim / 2, is rotated by `position * theta^(-2i / head_dim)`. The sine is
    negated in the first half for `lm.model.functional.rotate`.
    """
    # In float32 as in transformers: at late positions the angle's rounding exceeds 1e-5.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class Attention(nn.Module):
    """Causal attention of `num_heads` queries over `num_kv_heads` keys and values, with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.head_dim
        self.rows = [heads * self.head_dim for heads in (config.num_heads, config.kv_heads, config.kv_heads)]  # of qkv
        self.qkv = nn.Linear(config.hidden_size, sum(self.rows), bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.query_norm = self.key_norm = None
        if config.query_key_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.value_shares = None
        if config.value_residual and layer > 0:
            self.value_shares = nn.Parameter(torch.empty(2))  # shares of this layer's and the first layer's values

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        first_value: Tensor | None = None,
        cache: "KeyValueCache | None" = None,
        span: Span | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The branch's output for x, and the values that attention used.

        Args:
            x: (B, T, H).
            cos: (1 or B, T, 1, head_dim), of `rotary_tables`, as is sin.
            sin: As cos.
            first_value: (B, T, kv_heads, head_dim), the values of the first layer, with `value_residual`.
            cache: Where keys and values of the tokens are stored and read.
            span: Positions and mask of the tokens, and their slots in a cache; by default each sees all before it.
            layer: Index of this layer in the cache.

        Returns:
            (B, T, H), and the values of these T tokens (B, T, kv_heads, head_dim).
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads + 2 kv_heads, head_dim)
        if self.query_norm is not None:
            query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
            qkv = torch.cat((self.query_norm(query).to(qkv), self.key_norm(key).to(qkv), value), dim=2)
        cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
        query, key, value = split_and_rotate(qkv, self.num_heads, self.num_kv_heads, cos, sin)
        if self.value_shares is not None:
            value = value * self.value_shares[0] + first_value * self.value_shares[1]
        if cache is None:
            mask, causal = (None, True) if span is None else (span.mask, span.causal)
            mixed = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, causal)
        else:
            mixed = cache.attend(layer, span, query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2)), value  # mixed is (B, heads, T, head_dim)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.rows = [config.intermediate_size, config.intermediate_size]  # of gate_up
        self.gate_up = nn.Linear(config.hidden_size, sum(self.rows), bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, compute: "Compute", *inputs: Any) -> tuple[Tensor, Tensor]:
        """Run ``compute``, which is `compute_block`, compiled or checkpointed. The module's hooks, with which
        FSDP gathers weights, run outside it."""
        return compute(self, *inputs)

    def compute(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
        """The residual stream (B, T, H) after the block, and the values; context as in `Attention`."""
        mixed, value = self.attention(self.attention_norm(x), *context)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), value


Compute = Callable[..., tuple[Tensor, Tensor]]


def compute_block(block: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
    """`Block.compute` of a block of any class."""
    return block.compute(*inputs)


class Decoder(nn.Module):
    """Token ids in, logits of the next token out.

    >>> config = DecoderConfig(
    ...     vocab_size=512, hidden_size=64, intermediate_size=172, num_layers=5, num_heads=8, num_kv_heads=4
    ... )
    >>> Decoder(config)(torch.zeros(2, 16, dtype=torch.int64)).shape
    torch.Size([2, 16, 512])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compiled_block: Compute | None = None
        self.recompute = False  # activation checkpointing of the blocks
        self.set_rotary_tables()
        self.initialize()

    def set_rotary_tables(self) -> None:
        config = self.config
        cos, sin = rotary_tables(config.max_sequence_length, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights from torch's global generator.

        | weight                         | value                                                             |
        |--------------------------------|-------------------------------------------------------------------|
        | norms                          | 1                                                                 |
        | value_shares                   | 0.5                                                               |
        | embedding, head                | N(0, 0.02)                                                        |
        | qkv, gate_up                   | N(0, 0.02)                                                        |
        | out, down (end of each branch) | N(0, 0.02 / sqrt(2 num_layers)): the residual sum keeps its size; |
        """
        for name, parameter in self.named_parameters():
            self.draw(name, parameter)

    def draw(self, name: str, weight: Tensor) -> Tensor:
        """Fill a tensor with the initial values of the named parameter."""
        if name.endswith("norm.weight"):
            return weight.fill_(1.0)
        if name.endswith("value_shares"):
            return weight.fill_(0.5)
        is_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        return weight.normal_(0.0, 0.02 / math.sqrt(2 * self.config.num_layers) if is_residual else 0.02)

    def compile_blocks(self) -> None:
        """Train with compiled blocks: compiled once for all blocks and batch shapes, so that a resumed run uses
        the same code."""
        self.compiled_block = torch.compile(compute_block, dynamic=True)

    @property
    def head_weight(self) -> Tensor:
        """(V, H): the matrix that maps hidden states to logits; the embedding itself if tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden_states(
        self,
        input_ids: Tensor,
        cache: "KeyValueCache | None" = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            input_ids: (B, T) int64. With a cache, the tokens that follow the cached ones.
            cache: Read and extended in place.
            lengths: (B,) int64: only the first `lengths[b]` tokens of row b count, the rest is padding on the
                right. Needed only with a cache; without one, causality hides the padding.
            positions: (B, T) integers, only without a cache: positions of the tokens in stories that share a row and do
                not see each other, from 0 in each.

        Returns:
            (B, T, H); arbitrary but finite where padding was.

        Raises:
            ValueError: If the sequence is longer than `max_sequence_length` or the cache's remaining capacity.
        """
        num_tokens = input_ids.shape[1]
        if num_tokens > self.config.max_sequence_length:
            raise ValueError(
                f"a sequence of {num_tokens} tokens is longer than max_sequence_length="
                f"{self.config.max_sequence_length}; shorten it or train a model of longer context"
            )
        if cache is None:
            return self.run(input_ids, span=None if positions is None else story_span(positions))
        span = cache.reserve(num_tokens, lengths)
        hidden = self.run(input_ids, cache, span)
        cache.advance(span)
        return hidden

    def embed(self, input_ids: Tensor, positions: slice | Tensor) -> Tensor:
        """The input (B, T, H) of the first block for input_ids (B, T) at `positions`."""
        return self.dropout(self.embedding(input_ids))

    def run(self, input_ids: Tensor, cache: "KeyValueCache | None" = None, span: Span | None = None) -> Tensor:
        """Hidden states (B, T, H) of input_ids (B, T), at the positions and cache slots of the span. Nothing in
        it depends on a tensor's values, so that it can be compiled; `hidden_states` checks and counts."""
        positions = slice(input_ids.shape[1]) if span is None else span.positions
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)  # (1 or B, T, 1, head_dim)
        x = self.embed(input_ids, positions)  # (B, T, H)
        compute = compute_block
        compiled = self.compiled_block is not None and self.training
        if compiled:
            from experiment.compat.torch import mark_static

            compute = self.compiled_block
            # Else a length equal to a width would be compiled as the same symbol, and other lengths recompiled.
            for tensor in (x, cos, sin, self.cos, self.sin):
                mark_static(tensor, tensor.ndim - 1)
        if self.recompute and self.training:
            compute = partial(checkpoint, compute, use_reentrant=False)
        first_value = None
        for layer, block in enumerate(self.blocks):
            x, value = block(compute, x, cos, sin, first_value, cache, span, layer)
            if self.config.value_residual and layer == 0:
                first_value = value
                if compiled:
                    mark_static(first_value, [2, 3])
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: logits (..., V) of hidden states (..., H)."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def forward(self, input_ids: Tensor, cache: "KeyValueCache | None" = None, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each position; arguments and errors as in `hidden_states`."""
        return self.logits(self.hidden_states(input_ids, cache, lengths))
