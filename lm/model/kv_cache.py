"""The key-value cache of the decoder in lm/model/decoder.py."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.compat.torch import mark_dynamic, maybe_mark_dynamic
from experiment.nn.attention import attention
from lm.model.config import DecoderConfig
from lm.model.functional import Span


@dataclass
class CacheSpan(Span):
    """The slots of the T tokens of one call in a KeyValueCache, and what they may see."""

    slots: slice | Tensor  # slots to write; (B, T) if rows differ, with padding in the spare slot
    visible: int  # attention reads the first `visible` slots
    lengths: list[int] | None = None  # lengths of the rows after the call
    added: Tensor | int | None = None  # (B,) or one number for all: tokens that count


class KeyValueCache:
    """Keys and values of the tokens seen so far, in buffers of a fixed capacity, which only `grow` changes.

    Rows may hold sequences of different lengths. Slots beyond a row's length are never visible. The cache is
    written in place, so use it under `torch.no_grad` or `torch.inference_mode`.

    Args:
        config: The decoder's configuration.
        batch_size: Number of rows, B.
        capacity: Tokens that a row can hold, at most `config.max_sequence_length`.
        dtype: Type of keys and values: the decoder's, or autocast's if that is on.
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
        # Zeros: masked slots enter products with weight 0, and 0 * nan is nan. The slot beyond the capacity takes
        # the padding of ragged calls and is never read.
        shape = (batch_size, config.kv_heads, capacity + 1, config.head_dim)
        self._layers = [
            [torch.zeros(shape, dtype=dtype, device=device) for _ in ("keys", "values")]
            for _ in range(config.num_layers)
        ]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._lengths = [0] * batch_size  # the same on the host, without synchronization

    def reserve(self, num_tokens: int, lengths: Tensor | None = None) -> CacheSpan:
        """Plan for `num_tokens` more tokens per row, of which the first `lengths[b]` count (all if None).

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
            # Prompts. Padding is right of a row's tokens: causality hides it, later tokens overwrite it.
            slots = slice(0, num_tokens)
            return CacheSpan(new[None], None, num_tokens > 1, slots, num_tokens, after, added)
        if start == longest and lengths is None:
            positions = start + new[None]
            visible = start + num_tokens
            mask = self._mask(positions, visible) if num_tokens > 1 else None
            return CacheSpan(positions, mask, False, slice(start, visible), visible, after, added)
        positions = self.lengths[:, None] + new
        visible = min(longest + num_tokens, self.capacity)
        mask = self._mask(positions, visible)
        slots = positions if lengths is None else positions.masked_fill(new >= added[:, None], self.capacity)
        return CacheSpan(positions.clamp(max=self.capacity - 1), mask, False, slots, visible, after, added)

    @classmethod
    def of(cls, buffers: Sequence[Tensor], lengths: Tensor) -> "KeyValueCache":
        """A cache of these tensors, for compiled code; only for `next_span` and `write`."""
        cache = cls.__new__(cls)
        cache._layers = [list(buffers[i : i + 2]) for i in range(0, len(buffers), 2)]
        cache.lengths = lengths
        return cache

    @property
    def buffers(self) -> list[Tensor]:
        """Keys and values of each layer in turn, (B, kv_heads, capacity + 1, head_dim)."""
        return list(itertools.chain.from_iterable(self._layers))

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
                stored[rows, :, span.slots] = new.to(stored.dtype)
        keys, values = self._layers[layer]
        return keys[:, :, : span.visible], values[:, :, : span.visible]

    def attend(self, layer: int, span: CacheSpan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store key and value (B, T, kv_heads, head_dim), and attend by query (B, T, heads, head_dim) to what the span
        makes visible: (B, heads, T, head_dim)."""
        keys, values = self.write(layer, span, key, value)
        query = query.transpose(1, 2)
        by_hand = query.device.type == "cpu" or torch.compiler.is_compiling()
        if by_hand and span.mask is not None and query.shape[2] == 1:
            return attend_one(query, keys, values, span.mask)
        return attention(query, keys, values, span.mask, span.causal)

    def clear(self) -> None:
        """Forget all tokens."""
        self.lengths.zero_()
        self._lengths = [0] * len(self._lengths)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, at least the current capacity and at most the model's context."""
        for layer in self._layers:
            for i, stored in enumerate(layer):
                layer[i] = stored.new_zeros(*stored.shape[:2], capacity + 1, stored.shape[3])
                layer[i][:, :, : self.capacity] = stored[:, :, : self.capacity]
        self.capacity = capacity

    def mark_dynamic(self) -> None:
        """Let torch.compile generate one code for all batch sizes and capacities."""
        maybe_mark_dynamic(self.lengths, 0)
        for stored in self.buffers:
            maybe_mark_dynamic(stored, 0)
            mark_dynamic(stored, 2)

    def next_span(self, slots: Tensor | None = None) -> CacheSpan:
        """The span of one more token per row, with tensor operations only, so that all steps share compiled or captured
        code. The step adds 1 to `lengths`; `advance_one` counts on the host.

        Args:
            slots: arange of the number of slots that attention reads, at least those in use; rows may then outgrow the
                capacity, and what they write is never read. None reads the whole capacity.
        """
        capacity = self._layers[0][0].shape[2] - 1  # symbolic, whereas self.capacity would be a constant in the code
        positions = self.lengths[:, None]
        if slots is None:
            return CacheSpan(positions, self._mask(positions, capacity), False, positions, capacity)
        mask = (slots <= positions[:, :, None])[:, None]
        held = positions.clamp(max=capacity - 1)
        return CacheSpan(held, mask, False, positions.clamp(max=capacity), slots.shape[0])

    def advance_one(self) -> None:
        """Count one more token per row, written by compiled code."""
        self._lengths = [held + 1 for held in self._lengths]

    def advance(self, span: CacheSpan) -> None:
        """Count the tokens of a span after every layer has written them."""
        self.lengths += span.added
        self._lengths = span.lengths

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        self._layers = [[stored.index_select(0, index) for stored in layer] for layer in self._layers]
        self.lengths = self.lengths.index_select(0, index)
        self._lengths = [self._lengths[row] for row in rows]


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token per row, on a CPU or in compiled code.

    On a CPU, `scaled_dot_product_attention` has more overhead than work for one row, and with a mask takes three times
    as long as plain products for many; on a GPU, torch.compile fuses the sums.

    Args:
        query: (B, heads, 1, head_dim).
        key: (B, kv_heads, S, head_dim).
        value: As key.
        mask: (B, 1, 1, S), True where the token attends.

    Returns:
        (B, heads, 1, head_dim).
    """
    grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1)) * query.shape[-1] ** -0.5  # (B, kv_heads, group, D)
    sums = len(query) == 1 or query.is_cuda  # which torch.compile fuses
    scores = (grouped.unsqueeze(3) * key.unsqueeze(2)).sum(-1) if sums else grouped @ key.mT
    probs = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # (B, kv_heads, group, S)
    mixed = (probs.unsqueeze(-1) * value.unsqueeze(2)).sum(-2) if sums else probs @ value
    return mixed.flatten(1, 2).unsqueeze(2)
