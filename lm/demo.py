"""A trained language model to use: it continues a text token by token, and says what else might have come."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from torch import Tensor

from experiment.nn.hardware import default_device
from lm.convert import load_checkpoint
from lm.data.tokenizer import StoryTokenizer
from lm.decoding.config import GenerationConfig
from lm.decoding.generation import generate
from lm.decoding.quantization import prepare_for_decoding
from lm.decoding.sampling import filter_logits
from lm.model.decoder import Decoder

ALTERNATIVES = 5  # shown for each token
MOST_CHARACTERS = 50_000  # far beyond any context, and tokenised in no time
PAUSE = 0.03  # seconds between two updates of a growing story; a browser draws no more in that time


@dataclass
class Ending:
    """How a story ended.

    Args:
        reason: As in `lm.decoding.generation.Generation`.
        rest: What was held back: a character that was never completed.
    """

    reason: str
    rest: str


@dataclass
class Choice:
    """A token of a story, and what might have stood in its place.

    Args:
        text: What it adds to the story; empty while a character is not complete.
        probability: By the model, at temperature 1 and unfiltered.
        alternatives: The likeliest tokens, and the chosen one: text, the model's probability, the probability with
            which it was drawn (after temperature and top-p), and whether it is the chosen one.
    """

    text: str
    probability: float
    alternatives: list[tuple[str, float, float, bool]]


class _Left(Exception):
    """The visitor did not wait for the end."""


class LanguageModelDemo:
    """A language model from a checkpoint, for any number of visitors at once: each story has its own cache and
    random numbers, and nothing of the model changes."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.decoder, self.tokenizer = load_checkpoint(checkpoint)
        self.decoder.to(default_device())
        on_cpu = self.decoder.embedding.weight.device.type == "cpu"
        # Once for all stories.
        self._prepared = prepare_for_decoding(self.decoder, pack=True) if on_cpu else self.decoder

    def tell(self, beginning: str, **generation: Any) -> str:
        """A beginning with its continuation.

        Args:
            beginning: Text in the model's language.
            generation: Fields of `lm.decoding.generation.GenerationConfig`, such as ``temperature=0.8, seed=1``.

        Raises:
            ValueError: The beginning is empty or leaves no room in the model's context, or a field is out of range.
        """
        prompt = self._encode(beginning)
        config, eos_id, decode = GenerationConfig(**generation), self.tokenizer.eos_id, self.tokenizer.decode
        (result,) = generate(self._prepared, [prompt], config, eos_id, decode)
        return decode(prompt + result.token_ids)

    def stream(self, beginning: str, config: GenerationConfig) -> Iterator[list[Choice] | Ending]:
        """Continue a beginning, token by token.

        Yields:
            The tokens that were chosen since the last time, as they come; at last how the story ended.

        Raises:
            ValueError: The beginning is empty or leaves no room in the model's context.
        """
        prompt = self._encode(beginning)
        arrived: SimpleQueue[Choice | Ending | Exception] = SimpleQueue()
        left = threading.Event()
        choices = _Choices(self.decoder, self.tokenizer, prompt, config)

        def on_token(row: int, token: int) -> None:
            if left.is_set():
                raise _Left
            arrived.put(choices.take(token))

        def work() -> None:
            try:
                eos = self.tokenizer.eos_id
                result = generate(self._prepared, [prompt], config, eos, on_token=on_token, on_logits=choices.weigh)
                arrived.put(Ending(result[0].finish_reason, choices.held_back))
            except Exception as error:  # for the thread that waits
                arrived.put(error)

        threading.Thread(target=work, name="story", daemon=True).start()
        try:
            while True:
                come = [arrived.get()]
                time.sleep(PAUSE)
                come += _waiting(arrived)
                end = come.pop() if not isinstance(come[-1], Choice) else None
                if come:
                    yield come
                if isinstance(end, Exception):
                    raise end
                if end is not None:
                    yield end
                    return
        finally:
            left.set()

    def _encode(self, beginning: str) -> list[int]:
        if not beginning.strip():
            raise ValueError("Type a beginning first, such as: Once upon a time")
        context = self.decoder.config.max_sequence_length
        long = len(beginning) > MOST_CHARACTERS
        prompt = [] if long else self.tokenizer.encode_prompt(beginning)
        if long or len(prompt) >= context:
            held = f"{len(beginning):,} characters" if long else f"{len(prompt):,} tokens"
            raise ValueError(f"This beginning is too long: {held}, but the model holds {context:,} tokens. Shorten it.")
        return prompt


def _waiting(queue: SimpleQueue) -> Iterator:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


class _Choices:
    """Follows one story: the logits of each step, then the token that was chosen."""

    def __init__(
        self, decoder: Decoder, tokenizer: StoryTokenizer, prompt: Sequence[int], config: GenerationConfig
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.ids = list(prompt)
        self.shown = len(tokenizer.decode(prompt))

    def weigh(self, row: int, logits: Tensor) -> None:
        logits = logits.cpu()
        self.probabilities = logits.softmax(-1)
        if self.config.temperature == 0:
            self.drawn = (self.probabilities == self.probabilities.max()).float()
        else:
            scaled = (logits - logits.max()) / self.config.temperature
            self.drawn = filter_logits(scaled[None], top_p=self.config.top_p)[0].softmax(-1)

    def take(self, token: int) -> Choice:
        likeliest = self.probabilities.topk(min(ALTERNATIVES, len(self.probabilities))).indices.tolist()
        shown = likeliest if token in likeliest else [*likeliest, token]
        alternatives = [(self._name(i), self.probabilities[i].item(), self.drawn[i].item(), i == token) for i in shown]
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        new = "" if text.endswith("\ufffd") else text[self.shown :]  # held back until the character is complete
        self.shown += len(new)
        return Choice(new, self.probabilities[token].item(), alternatives)

    @property
    def held_back(self) -> str:
        return self.tokenizer.decode(self.ids)[self.shown :]

    def _name(self, token: int) -> str:
        """A token's text where it would stand now."""
        if token == self.tokenizer.eos_id:
            return "(the end)"
        before = self.ids[-1:]  # a space at the very beginning of a text is dropped
        return self.tokenizer.decode([*before, token])[len(self.tokenizer.decode(before)) :] or "(part of a character)"
