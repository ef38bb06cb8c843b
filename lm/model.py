"""The decoder: a LLaMA-style transformer in plain torch, and its static key-value cache.

Architecture (Touvron et al. 2023, arXiv:2302.13971): pre-norm blocks of RMSNorm, causal attention with
rotary positions and grouped key-value heads, and SwiGLU; no biases. Equal to `transformers.LlamaForCausalLM`
weight for weight: a rotary pair is element i of each half of a head (Hugging Face's layout), not two
neighbours (Meta's and llama2.c's).

Two choices differ from the reference in form, not in value:

- query, key and value share one matrix (`qkv`), gate and up another (`gate_up`): fewer, larger products, and
  one cast of each input under autocast. `lm.convert` splits them.
- queries and keys are rotated together, as heads of one tensor.

Training calls `scaled_dot_product_attention` with `is_causal` and no mask, which keeps it on the fused kernel
of every device; dropout stands on the residual branches only: on attention weights it would leave that
kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class DecoderConfig:
    """The whole shape of a decoder.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the SwiGLU.
        num_layers: Number of blocks.
        num_heads: Number of query heads; `hidden_size / num_heads` is the size of a head and must be even.
        num_kv_heads: Number of key and value heads, a divisor of `num_heads` (grouped heads, Ainslie et al.
            2023, arXiv:2305.13245); None means as many as query heads.
        max_sequence_length: Context in tokens; longer sequences are refused.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Added to the mean square before the root.
        tie_embeddings: Whether the output head is the embedding matrix.
        dropout: Probability of dropping an element of the embeddings and of each residual branch in training.

    Raises:
        ValueError: If the numbers do not make a decoder.
    """

    vocab_size: int = 32768
    hidden_size: int = 288
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int | None = None
    max_sequence_length: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "max_sequence_length",
            "rope_theta",
            "rms_norm_eps",
        ):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number; give one")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; choose a divisor"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads = {self.head_dim} is odd, but rotary positions turn pairs; "
                "choose hidden_size and num_heads with an even quotient"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: expected a probability in [0, 1); 0 turns it off")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads, also where `num_kv_heads` is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclass
class CacheSpan:
    """Where the T tokens of one call go in a KeyValueCache, and what they may see."""

    positions: Tensor  # (1 or B, T) places in the sequence
    slots: slice | Tensor  # where they are written; (B, T) where rows differ, padding going to the spare slot
    visible: int  # attention reads the first `visible` slots
    mask: Tensor | None  # (1 or B, 1, T, visible), True where a token may look; None where `causal` suffices
    causal: bool
    lengths: list[int]  # what the rows hold once the call is over
    added: Tensor | int  # (B,) or one number for all: tokens that count


class KeyValueCache:
    """Keys and values of the tokens seen so far, in buffers allocated once.

    Rows may hold sequences of different lengths. What lies beyond a row's length is never visible. It is
    written in place, so use it under `torch.no_grad` or `torch.inference_mode`.

    Args:
        config: The decoder's configuration.
        batch_size: Number of rows, B.
        capacity: Tokens that a row can hold, at most `config.max_sequence_length`.
        dtype: Type of keys and values: the decoder's, or the type of autocast where that is on.
        device: Where the decoder is.

    Raises:
        ValueError: If capacity is not between 1 and the model's context, or batch_size is not positive.

    Attributes:
        lengths: (B,) int64, tokens held by each row.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least one row")
        if not 1 <= capacity <= config.max_sequence_length:
            raise ValueError(
                f"capacity={capacity}: expected 1 to {config.max_sequence_length} tokens, the model's "
                "max_sequence_length; shorten the sequence or use a model of longer context"
            )
        self.capacity = capacity
        # Zeros, not empty: a masked slot still enters a product with weight 0, and 0 * nan is nan. One slot
        # more than the capacity takes the padding of ragged calls; it is never read.
        shape = (2, batch_size, config.kv_heads, capacity + 1, config.head_dim)
        self._layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [0] * batch_size  # the same on the host, so that no step waits for the device

    def reserve(self, num_tokens: int, lengths: Tensor | None = None) -> CacheSpan:
        """Plan for `num_tokens` more tokens a row, of which the first `lengths[b]` count (all if None).

        Raises:
            ValueError: If a row would outgrow the capacity, or `lengths` does not fit the batch.
        """
        counts = [num_tokens] * len(self._lengths) if lengths is None else lengths.tolist()
        if len(counts) != len(self._lengths):
            raise ValueError(f"lengths has {len(counts)} entries, but the cache {len(self._lengths)} rows")
        if not all(0 <= count <= num_tokens for count in counts):
            raise ValueError(f"lengths={counts}: expected 0 to {num_tokens}, the number of new tokens")
        after = [held + count for held, count in zip(self._lengths, counts, strict=True)]
        if max(after) > self.capacity:
            raise ValueError(
                f"{max(after)} tokens do not fit the cache of {self.capacity}; "
                "make a larger one or drop the oldest tokens"
            )
        device = self.lengths.device
        added = num_tokens if lengths is None else lengths.to(device)
        start, longest = min(self._lengths), max(self._lengths)
        new = torch.arange(num_tokens, device=device)
        if longest == 0 and num_tokens <= self.capacity:
            # Prompts. Padding stands right of a row's tokens: causality hides it, later tokens overwrite it.
            slots = slice(0, num_tokens)
            return CacheSpan(new[None], slots, num_tokens, None, num_tokens > 1, after, added)
        if start == longest and lengths is None:
            positions = start + new[None]
            visible = start + num_tokens
            mask = self._mask(positions, visible) if num_tokens > 1 else None
            return CacheSpan(positions, slice(start, visible), visible, mask, False, after, added)
        positions = self.lengths[:, None] + new
        visible = min(longest + num_tokens, self.capacity)
        mask = self._mask(positions, visible)
        slots = positions if lengths is None else positions.masked_fill(new >= added[:, None], self.capacity)
        return CacheSpan(positions.clamp(max=self.capacity - 1), slots, visible, mask, False, after, added)

    @staticmethod
    def _mask(positions: Tensor, visible: int) -> Tensor:
        return (torch.arange(visible, device=positions.device) <= positions[:, :, None])[:, None]

    def write(self, layer: int, span: CacheSpan, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, T, kv_heads, head_dim), return all (B, kv_heads, visible, head_dim)."""
        for stored, new in zip(self._layers[layer], (key, value), strict=True):
            if isinstance(span.slots, slice):
                stored[:, :, span.slots].copy_(new.transpose(1, 2))
            else:
                rows = torch.arange(stored.shape[0], device=stored.device)[:, None]
                stored.transpose(1, 2)[rows, span.slots] = new.to(stored.dtype)
        keys, values = self._layers[layer][:, :, :, : span.visible]
        return keys, values

    def advance(self, span: CacheSpan) -> None:
        """Count the tokens of a span once every layer has written them."""
        self.lengths += span.added
        self._lengths = span.lengths

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        self._layers = [stored.index_select(1, index) for stored in self._layers]
        self.lengths = self.lengths.index_select(0, index)
        self._lengths = [self._lengths[row] for row in rows]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, arXiv:1910.07467), taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of rotary angles (Su et al. 2021, arXiv:2104.09864), each (length, head_dim).

    Pair i of a head, its elements i and i + head_dim / 2, turns by `position * theta^(-2i / head_dim)`. The
    sine is negated in the first half, so that `rotate` needs no negation of its own.
    """
    # In float32 as in transformers: at late positions the rounding of the angle is larger than 1e-5.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x (B, T, heads, head_dim) by tables (1 or B, T, 1, head_dim) of `rotary_tables`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Causal attention of `num_heads` queries over `num_kv_heads` keys and values, with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.head_dim
        width = (config.num_heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        span: CacheSpan | None = None,
        layer: int = 0,
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads + 2 kv_heads, head_dim)
        turned, value = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        turned = rotate(turned, cos.to(qkv.dtype), sin.to(qkv.dtype))
        query, key = turned.split((self.num_heads, self.num_kv_heads), dim=2)
        if cache is None:
            key, value, mask, causal = key.transpose(1, 2), value.transpose(1, 2), None, True
        else:
            key, value = cache.write(layer, span, key, value)
            mask, causal = span.mask, span.causal
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )  # (B, heads, T, head_dim)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        span: CacheSpan | None = None,
        layer: int = 0,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, cache, span, layer))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config.max_sequence_length, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights from torch's global generator.

        | weight                         | value                                                             |
        |--------------------------------|-------------------------------------------------------------------|
        | norms                          | 1                                                                 |
        | embedding, head                | N(0, 0.02)                                                        |
        | qkv, gate_up                   | N(0, 0.02)                                                        |
        | out, down (end of each branch) | N(0, 0.02 / sqrt(2 num_layers)): the residual sum keeps its size  |
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                is_residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
                parameter.normal_(0.0, residual_std if is_residual else 0.02)

    @property
    def head_weight(self) -> Tensor:
        """(V, H): the matrix that turns hidden states into logits; the embedding itself where tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden_states(
        self, input_ids: Tensor, cache: KeyValueCache | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Run the blocks and the final norm.

        Args:
            input_ids: (B, T) int64. With a cache, the tokens that follow those it holds.
            cache: Read and extended in place.
            lengths: (B,) int64: only the first `lengths[b]` tokens of row b count, the rest is padding on the
                right. Needed with a cache only; without one, causality hides what stands on the right.

        Returns:
            (B, T, H); arbitrary but finite where padding was.

        Raises:
            ValueError: If the sequence is longer than `max_sequence_length` or than what the cache has left.
        """
        num_tokens = input_ids.shape[1]
        if num_tokens > self.config.max_sequence_length:
            raise ValueError(
                f"a sequence of {num_tokens} tokens is longer than max_sequence_length="
                f"{self.config.max_sequence_length}; shorten it or train a model of longer context"
            )
        span = None
        if cache is None:
            cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        else:
            span = cache.reserve(num_tokens, lengths)
            cos, sin = self.cos[span.positions], self.sin[span.positions]
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (1 or B, T, 1, head_dim)
        x = self.dropout(self.embedding(input_ids))  # (B, T, H)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache, span, layer)
        if cache is not None:
            cache.advance(span)
        return self.norm(x)

    def forward(self, input_ids: Tensor, cache: KeyValueCache | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each position; arguments and errors as `hidden_states`."""
        return F.linear(self.hidden_states(input_ids, cache, lengths), self.head_weight)
