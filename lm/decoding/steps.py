"""Logits of the next tokens of several stories: recomputed from the whole text, or from a cache, plain or compiled.

Each class is called once for each new token, with the token ids of every row: {row: token ids}.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lm.decoding.compilation import CompiledStep
from lm.decoding.quantization import WeightDtype, prepare_for_decoding
from lm.decoding.sampling import argmax
from lm.model.decoder import Decoder
from lm.model.kv_cache import KeyValueCache

GROWTH = 64  # tokens by which a cache for compiled code grows
STEPPED = 4  # prompts up to this length are faster token by token in compiled code than as one eager prefill
PACKED_FROM = 16  # packing the matrices pays off from this many new tokens


def prepare_if_faster(
    decoder: Decoder, num_rows: int, max_new_tokens: int, dtype: WeightDtype | None, compile: bool
) -> Decoder:
    """`prepare_for_decoding` of the decoder, or the decoder itself if that would not be faster; same errors."""
    weight = decoder.embedding.weight
    # FSDP marks a sharded decoder by a subclass.
    plain = type(decoder) is Decoder and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if dtype is None and not (plain and weight.device.type == "cpu"):
        return decoder
    pack = max_new_tokens >= PACKED_FROM and not (compile and num_rows == 1)
    if dtype is None and not compile and not pack:
        return decoder
    return prepare_for_decoding(decoder, dtype or "float32", pack)


class Recomputed:
    """Logits of the next tokens, recomputed from the whole windows: the baseline."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, windows: Mapping[int, Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Logits (B, V) in float32, and their argmax (B,)."""
        input_ids, lengths = pad(list(windows.values()), self.decoder)
        return last_logits(self.decoder, self.decoder.hidden_states(input_ids), lengths)


class Cached:
    """Logits of the next tokens, from the last tokens and a cache.

    Args:
        decoder: In eval mode.
        max_new_tokens: Maximum new tokens per row.
        compile: Run one-token steps in compiled code.
    """

    def __init__(self, decoder: Decoder, max_new_tokens: int, compile: bool) -> None:
        self.decoder, self.max_new_tokens, self.compile = decoder, max_new_tokens, compile
        self.compiled: CompiledStep | None = None
        self.cache: KeyValueCache | None = None
        self.held: dict[int, int] = {}  # row: tokens of its window in the cache

    def __call__(self, windows: Mapping[int, Sequence[int]]) -> tuple[Tensor, Tensor]:
        """As `Recomputed`; rows may have left since the last call.

        Raises:
            CompilationError, InputError: As `CompiledStep`.
        """
        if self.cache is None:
            self.num_rows, longest = len(windows), max(map(len, windows.values()))
            # The last token is never read back.
            self.capacity = min(longest + self.max_new_tokens - 1, self.decoder.config.max_sequence_length)
        refilled = any(len(window) != self.held.get(row, -1) + 1 for row, window in windows.items())
        if refilled:
            # At the start, and again after a window was cut: its keys have old positions.
            new = list(windows.values())
            self.cache = self._empty_cache(len(new), max(map(len, new)))
        else:
            new = [window[-1:] for window in windows.values()]
            if len(windows) < len(self.held):
                places = {row: place for place, row in enumerate(self.held)}
                self.cache.keep([places[row] for row in windows])
        self.held = {row: len(window) for row, window in windows.items()}
        on_cpu = self.decoder.embedding.weight.device.type == "cpu"
        short = on_cpu and len(new) == 1 and len(new[0]) <= min(STEPPED, self.capacity - 1)
        if self.compile and (short or not refilled):
            for tokens in zip(*new, strict=True):
                result = self._step(tokens)
            return result
        input_ids, lengths = pad(new, self.decoder)
        hidden = self.decoder.hidden_states(input_ids, self.cache, lengths)
        return last_logits(self.decoder, hidden, lengths)

    def _empty_cache(self, num_rows: int, longest: int) -> KeyValueCache:
        device = self.decoder.embedding.weight.device
        # Compiled code reads the whole capacity, which therefore grows with the stories.
        capacity = min(self.capacity, longest + GROWTH) if self.compile else self.capacity
        return KeyValueCache(self.decoder.config, num_rows, capacity, cache_dtype(self.decoder), device)

    def _step(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One more token per row, with code compiled at the first call."""
        if self.compiled is None:
            self.compiled = CompiledStep(self.decoder, self.num_rows)
        if max(self.held.values()) > self.cache.capacity:
            self.cache.grow(min(self.cache.capacity + GROWTH, self.capacity))
        device = self.decoder.embedding.weight.device
        if len(tokens) == 1:  # faster than from a list
            input_ids = torch.full((1, 1), tokens[0], device=device)
        else:
            input_ids = torch.tensor(tokens, device=device)[:, None]
        result = self.compiled(input_ids, self.cache)
        self.cache.advance_one()
        return result


def cache_dtype(decoder: Decoder) -> torch.dtype:
    """Type of keys and values: autocast's if it is on, else the decoder's."""
    weight = decoder.embedding.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


def pad(windows: Sequence[Sequence[int]], decoder: Decoder) -> tuple[Tensor, Tensor | None]:
    """Ids (B, T), padded on the right, and lengths (B,), None if all are equal."""
    device = decoder.embedding.weight.device
    longest = max(map(len, windows))
    input_ids = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows], device=device)
    if all(len(window) == longest for window in windows):
        return input_ids, None
    return input_ids, torch.tensor([len(window) for window in windows], device=device)


def last_logits(decoder: Decoder, hidden: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (B, V) in float32 of each row's last hidden state only, since the head is the largest product; and their
    argmax (B,)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    last = hidden[:, -1] if lengths is None else hidden[rows, lengths - 1]
    logits = decoder.logits(last).float()
    return logits, argmax(logits)
