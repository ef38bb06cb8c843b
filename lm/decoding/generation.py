"""Decoding: greedy or sampled, cached or recomputed, one prompt or a batch of prompts of different lengths.

A story depends only on the decoder, the prompt and the configuration: not on the cache, nor on the other prompts in
the batch (up to rounding, which may differ between batch sizes). Every row has its own generator, seeded by the
seed and the prompt; a prompt repeated in a batch gives several stories, the first of which is the one it gives
alone.

A row that fills the decoder's context ends with "length"; with `sliding_window` it continues from the newest half of
its tokens, whose positions start at 0 again. The window is cut once it is full rather than shifted at each step, since
shifting changes every position and would recompute everything; cached and recomputed decoding see the same windows.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lm.decoding.cuda_graphs import can_run_ahead, steps_for
from lm.decoding.sampling import LARGEST_DRAW, choose
from lm.decoding.steps import Cached, Recomputed, prepare_if_faster
from lm.model.config import GenerationConfig
from lm.model.decoder import Decoder

FinishReason = Literal["eos", "stop", "length"]


@dataclass
class Generation:
    """The continuation of one prompt.

    Args:
        token_ids: The new tokens; the last is eos or completes the stop string if that ended the story.
        finish_reason: "eos", "stop" (one of `stop` occurred) or "length" (max_new_tokens or the end of the context).
    """

    token_ids: list[int]
    finish_reason: FinishReason


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    eos_id: int | None = None,
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt, all in one batch.

    Args and errors as of `stream`; on_token is called with (row, token id) for every new token as soon as it is chosen.

    Returns:
        One `Generation` per prompt, in order.
    """
    results = [Generation([], "length") for _ in prompts]
    with closing(stream(decoder, prompts, config, eos_id, decode)) as tokens:
        for row, token, finish_reason in tokens:
            results[row].token_ids.append(token)
            results[row].finish_reason = finish_reason
            if on_token is not None:
                on_token(row, token)
    return results


@torch.inference_mode()
def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    eos_id: int | None = None,
    decode: Callable[[list[int]], str] | None = None,
    on_logits: Callable[[int, Tensor], None] | None = None,
) -> Iterator[tuple[int, int, FinishReason | None]]:
    """Continue all prompts in one batch; rows that end leave the batch. Close the generator to stop early.

    Args:
        decoder: Switched to eval mode while decoding, then restored.
        prompts: Token ids of each, bos included if the decoder was trained with it.
        config: See `GenerationConfig`.
        eos_id: The token that ends a story; None: none does.
        decode: Ids to text; needed for `config.stop` only.
        on_logits: Called with (row, logits (V,)) before each token is chosen.

    Yields:
        Row, its new token id, and the reason if this ended the row, else None.

    Raises:
        ValueError: If a prompt is empty, holds an unknown id or is longer than the context without a sliding
            window, or `config.stop` is given without `decode`; and if the decoder's logits are not finite.
        CompilationError: `config.compile` finds no compiler; a ValueError too.
        InputError: `config.compile` cannot write tinylab's cache folder.
    """
    _check_prompts(decoder, prompts, config.sliding_window)
    if config.stop and decode is None:
        raise ValueError(f"stop={config.stop}: strings can only be found in text; pass decode as well")
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for index, prompt in enumerate(prompts):
        rows.append(_Row(index, prompt, config.seed, repeat=seen[tuple(prompt)]))
        rows[-1].slide(decoder.config.max_sequence_length)
        seen[tuple(prompt)] += 1
    training = decoder.training
    decoder.eval()
    try:
        fast = prepare_if_faster(decoder, len(rows), config.max_new_tokens, config.weight_dtype, config.compile)
        if rows and config.use_cache and on_logits is None and can_run_ahead(fast):
            steps = _ahead(fast, rows, config)
        else:
            steps = _in_turn(fast, rows, config, on_logits)
        for tokens in steps:
            for row, token in zip(rows, tokens, strict=True):
                if row.finish_reason is not None:
                    continue
                if token < 0:
                    raise ValueError(
                        "the decoder's logits are not finite: its weights are broken; use an earlier checkpoint"
                    )
                row.add(token)
                row.finish_reason = _finish_reason(row, decoder, config, eos_id, decode)
                yield row.index, token, row.finish_reason
                if row.finish_reason is None:
                    row.slide(decoder.config.max_sequence_length)
    finally:
        decoder.train(training)


class TextStream:
    """The text of a story as its tokens arrive; an incomplete character is held back.

    Attributes:
        text: The text so far, including the prompt.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self.decode, self.ids = decode, list(prompt)
        self.text = decode(self.ids)

    def add(self, token: int) -> str:
        """The text that a token adds."""
        self.ids.append(token)
        text = self.decode(self.ids)
        return "" if text.endswith("\ufffd") else self._grow(text)

    def rest(self) -> str:
        """The text that was held back."""
        return self._grow(self.decode(self.ids))

    def _grow(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new


class _Row:
    """The state of one prompt."""

    def __init__(self, index: int, prompt: Sequence[int], seed: int, repeat: int) -> None:
        self.index = index
        self.window = list(prompt)  # the tokens the decoder sees
        self.token_ids = list(prompt)
        self.prompt_length = len(prompt)
        self.finish_reason: FinishReason | None = None
        digest = hashlib.sha256(repr((seed, repeat, list(prompt))).encode()).digest()
        # On the host, so that every device draws the same numbers.
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    @property
    def num_new(self) -> int:
        return len(self.token_ids) - self.prompt_length

    def add(self, token: int) -> None:
        self.window.append(token)
        self.token_ids.append(token)

    def slide(self, context: int) -> None:
        """Keep the newest half if the window has outgrown the context."""
        if len(self.window) > context:
            self.window = self.window[-max(1, context // 2) :]


def _finish_reason(
    row: _Row,
    decoder: Decoder,
    config: GenerationConfig,
    eos_id: int | None,
    decode: Callable[[list[int]], str] | None,
) -> FinishReason | None:
    if row.token_ids[-1] == eos_id:
        return "eos"
    if config.stop:
        # Not just the text of the new tokens: decoding drops a leading space.
        text = decode(row.token_ids)[len(decode(row.token_ids[: row.prompt_length])) :]
        if any(stop in text for stop in config.stop):
            return "stop"
    if row.num_new >= config.max_new_tokens:
        return "length"
    if len(row.window) > decoder.config.max_sequence_length and not config.sliding_window:
        return "length"
    return None


def _in_turn(
    decoder: Decoder, rows: list[_Row], config: GenerationConfig, on_logits: Callable[[int, Tensor], None] | None
) -> Iterator[list[int]]:
    """The next token of every row, step by step; -1 for rows that ended, which are no longer computed."""
    compile = config.compile and type(decoder) is Decoder  # not a variant
    next_logits = Cached(decoder, config.max_new_tokens, compile) if config.use_cache else Recomputed(decoder)
    while active := [row for row in rows if row.finish_reason is None]:
        logits, greedy = next_logits({row.index: row.window for row in active})
        if on_logits is not None:
            for row, of_row in zip(active, logits, strict=True):
                on_logits(row.index, of_row)
        tokens = [-1] * len(rows)
        draws, held = _draws(active, 1, config), _held(active, decoder, config)
        draws = None if draws is None else draws[0].to(logits.device)
        held = None if held is None else held.to(logits.device)
        for row, token in zip(active, choose(logits, greedy, draws, held, config).tolist(), strict=True):
            tokens[row.index] = token
        yield tokens


def _ahead(decoder: Decoder, rows: list[_Row], config: GenerationConfig) -> Iterator[list[int]]:
    """As `_in_turn`, but without waiting for the device: the next steps are queued before tokens are read. Tokens
    after a row's end are ignored."""
    context = decoder.config.max_sequence_length
    # The last token is never read back.
    capacity = min(max(len(row.window) for row in rows) + config.max_new_tokens - 1, context)
    with steps_for(decoder, len(rows), capacity, config) as steps:
        while active := [row for row in rows if row.finish_reason is None]:
            # Rows end when full, or all continue from where the first one is cut.
            full = [context + 1 - len(row.window) for row in active]
            left = [config.max_new_tokens - row.num_new for row in active]
            count = min(*full, max(left)) if config.sliding_window else max(map(min, full, left))
            windows = [row.window if row.finish_reason is None else [0] for row in rows]
            for tokens in steps.run(decoder, windows, count, _draws(rows, count, config), _held(rows, decoder, config)):
                yield tokens
                if all(row.finish_reason is not None for row in active):
                    break


def _draws(rows: list[_Row], steps: int, config: GenerationConfig) -> Tensor | None:
    """Random numbers (steps, B), each row's from its own generator; None for greedy decoding."""
    if config.temperature == 0:
        return None
    draws = torch.stack([torch.rand(steps, generator=row.generator) for row in rows], dim=1)
    return draws.clamp(max=LARGEST_DRAW)


def _held(rows: list[_Row], decoder: Decoder, config: GenerationConfig) -> Tensor | None:
    """(B, V), True for the tokens of each row's prompt and story; None without a penalty."""
    if config.repetition_penalty == 1:
        return None
    held = torch.zeros(len(rows), decoder.config.vocab_size, dtype=torch.bool)
    for of_row, row in zip(held, rows, strict=True):
        of_row[row.token_ids] = True
    return held


def _check_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], sliding_window: bool) -> None:
    context, vocab_size = decoder.config.max_sequence_length, decoder.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; begin it with a token, such as bos")
        if len(prompt) > context and not sliding_window:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, but the model's context is {context}; shorten the prompt, "
                "or set sliding_window"
            )
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"prompt {index} holds the token id {token}, but the model knows 0 to {vocab_size - 1}; "
                    "use the tokenizer that the model was trained with"
                )
