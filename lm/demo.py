"""A trained language model for use: continues a text token by token and shows each token's alternatives."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from experiment.nn.hardware import default_device
from experiment.sources.paths import texts_of
from experiment.wording import hint
from lm.data.tokenizer import StoryTokenizer
from lm.decoding.generation import TextStream, generate, stream
from lm.decoding.quantization import prepare_for_decoding
from lm.decoding.sampling import filter_logits
from lm.formats.pretrained import load_checkpoint
from lm.model.config import GenerationConfig

ALTERNATIVES = 5  # shown for each token
MOST_CHARACTERS = 50_000  # far beyond any context, and quick to tokenize
PAUSE = 0.03  # seconds between two updates of a growing story, as often as a browser draws


@dataclass
class Ending:
    """The end of a story: the reason, as in `lm.decoding.generation.Generation`, and an incomplete last character."""

    reason: str
    rest: str


@dataclass
class Choice:
    """A token of a story and its alternatives.

    Args:
        text: The text it adds; empty while a character is incomplete.
        probability: Of the model, at temperature 1 and unfiltered.
        alternatives: The most likely tokens and the chosen one: text, probability, probability after temperature and
            top-p, and whether it was chosen.
    """

    text: str
    probability: float
    alternatives: list[tuple[str, float, float, bool]]


class LanguageModelDemo:
    """A language model from a checkpoint, for concurrent use: each story has its own cache and random numbers."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.decoder, self.tokenizer = load_checkpoint(checkpoint)
        self.decoder.to(default_device())
        on_cpu = self.decoder.embedding.weight.device.type == "cpu"
        self._prepared = prepare_for_decoding(self.decoder, pack=True) if on_cpu else self.decoder

    @overload
    def tell(self, beginning: str, **generation: Any) -> str: ...

    @overload
    def tell(self, beginning: Iterable[str], **generation: Any) -> list[str]: ...

    def tell(self, beginning: str | Iterable[str], **generation: Any) -> str | list[str]:
        """A beginning with its continuation, or a list of these, generated in one batch.

        Args:
            beginning: Text, or texts.
            generation: Fields of `lm.model.config.GenerationConfig`, such as ``temperature=0.8, seed=1``. A story
                ends on its own or after ``max_new_tokens``, by default 200.

        Raises:
            TypeError: There is no such field, or a value is of another type.
            ValueError: A beginning is empty or fills the model's context, or a field is out of range.
        """
        known = [field.name for field in fields(GenerationConfig)]
        if unknown := [name for name in generation if name not in known]:
            near = hint(unknown[0], known)
            raise TypeError(f"tell() has no setting {unknown[0]!r}{near}: expected {', '.join(known)}")
        config, eos_id, decode = GenerationConfig(**generation), self.tokenizer.eos_id, self.tokenizer.decode
        prompts = [self._encode(text) for text in texts_of(beginning)]
        results = generate(self._prepared, prompts, config, eos_id, decode)
        stories = [decode(prompt + result.token_ids) for prompt, result in zip(prompts, results, strict=True)]
        return stories[0] if isinstance(beginning, str) else stories

    def stream(self, beginning: str, config: GenerationConfig) -> Iterator[list[Choice] | Ending]:
        """Continue a beginning: yields the tokens chosen since the last update and, finally, how the story ended.

        Raises:
            ValueError: The beginning is empty or fills the model's context.
        """
        prompt = self._encode(beginning)
        choices, come, shown = _Choices(self.tokenizer, prompt, config), [], time.monotonic()
        with closing(
            stream(self._prepared, [prompt], config, self.tokenizer.eos_id, on_logits=choices.weigh)
        ) as tokens:
            for _, token, reason in tokens:
                come.append(choices.take(token))
                if reason is not None or time.monotonic() - shown > PAUSE:
                    yield come
                    come, shown = [], time.monotonic()
        yield Ending(reason, choices.text.rest())

    def _encode(self, beginning: str) -> list[int]:
        if not beginning.strip():
            raise ValueError("Type a beginning first, such as: Once upon a time")
        context = self.decoder.config.max_sequence_length
        long = len(beginning) > MOST_CHARACTERS
        prompt = [] if long else self.tokenizer.encode_prompt(beginning)
        if long or len(prompt) >= context:
            held = f"{len(beginning):,} characters" if long else f"{len(prompt):,} tokens"
            raise ValueError(f"This beginning is too long: {held}, but the context is {context:,} tokens. Shorten it.")
        return prompt


class _Choices:
    """Follows one story: the logits of each step, then the chosen token."""

    def __init__(self, tokenizer: StoryTokenizer, prompt: Sequence[int], config: GenerationConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.text = TextStream(tokenizer.decode, prompt)

    def weigh(self, row: int, logits: Tensor) -> None:
        logits = logits.cpu()
        self.probabilities = logits.softmax(-1)
        if self.config.temperature == 0:
            self.drawn = (self.probabilities == self.probabilities.max()).float()
        else:
            scaled = (logits - logits.max()) / self.config.temperature
            self.drawn = filter_logits(scaled[None], top_p=self.config.top_p)[0].softmax(-1)

    def take(self, token: int) -> Choice:
        shown = self.probabilities.topk(min(ALTERNATIVES, len(self.probabilities))).indices.tolist()
        shown += [] if token in shown else [token]
        alternatives = [(self._name(i), self.probabilities[i].item(), self.drawn[i].item(), i == token) for i in shown]
        return Choice(self.text.add(token), self.probabilities[token].item(), alternatives)

    def _name(self, token: int) -> str:
        """A token's text at the current position."""
        if token == self.tokenizer.eos_id:
            return "(the end)"
        before = self.text.ids[-1:]  # a space at the very beginning of a text is dropped
        return self.tokenizer.decode([*before, token])[len(self.tokenizer.decode(before)) :] or "(part of a character)"
