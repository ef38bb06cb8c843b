"""The tab of ``python -m experiment.play`` where a language model goes on with what one types, token by token."""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import gradio as gr
from torch import Tensor

from experiment.words import Row, escaped, message, word
from lm.convert import load_checkpoint
from lm.generation import GenerationConfig, generate
from lm.model import Decoder
from lm.sampling import filter_logits
from lm.tokenizer import StoryTokenizer

ALTERNATIVES = 5  # shown of each token
MOST_CHARACTERS = 50_000  # far beyond any context, and tokenised in no time
SEEDS = 1000
PAUSE = 0.03  # seconds between two pictures of a story that grows; a browser draws no more in that time
BEGINNINGS = ["Once upon a time", "One day, a little girl named Lily", "Tom had a red ball.", "The dog was sad because"]
FINISHED = {"eos": "the story has ended", "stop": "the story has ended", "length": "stopped at the length"}
LEGEND = '<span class="legend">certain <i class="rare"></i> unlikely</span>'


@dataclass
class Ending:
    """How a story ended.

    Args:
        reason: As in `lm.generation.Generation`.
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


class Storyteller:
    """A language model from a checkpoint, for any number of visitors at once: each story has its own cache and
    random numbers, and nothing of the model changes."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.decoder, self.tokenizer = load_checkpoint(checkpoint)

    def tell(self, beginning: str, config: GenerationConfig) -> Iterator[list[Choice] | Ending]:
        """Go on with a beginning.

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
                result = generate(self.decoder, [prompt], config, eos, on_token=on_token, on_logits=choices.weigh)
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
        prompt = [] if long else [self.tokenizer.bos_id, *self.tokenizer.encode(beginning)]
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


def show(choice: Choice) -> str:
    """One token as a word whose ground tells how unlikely it was."""
    rows = [
        Row(name.replace("\n", "↵"), probability, _percent(probability, drawn), taken)
        for name, probability, drawn, taken in choice.alternatives
    ]
    return word(choice.text, "rare", 1 - choice.probability, "the model's chance → as drawn", rows)


def _percent(probability: float, drawn: float) -> str:
    return f"{probability:.1%} → {drawn:.1%}"


def add_tabs(checkpoints: dict[str, Path]) -> None:
    """One tab for each run, by name, inside of Gradio's tabs.

    Raises:
        InputError: A checkpoint or its tokenizer cannot be read.
    """
    for name, checkpoint in checkpoints.items():
        with gr.Tab("Stories" if len(checkpoints) == 1 else f"Stories: {name}"):
            _fill(Storyteller(checkpoint), name)


def _fill(teller: Storyteller, name: str) -> None:
    context = teller.decoder.config.max_sequence_length

    def tell(beginning: str | None, temperature: float, top_p: float, length: float, seed: float) -> Iterator[str]:
        try:
            config = GenerationConfig(int(length), temperature, top_p=top_p, seed=int(seed))
            yield from _page(teller, beginning or "", config)
        except ValueError as error:
            yield message(str(error))

    with gr.Row():
        with gr.Column(scale=3):
            gr.HTML(f'<span class="quiet">{escaped(_about(teller, name))}</span>')
            beginning = gr.Textbox(BEGINNINGS[0], label="Beginning", lines=2, max_lines=8)
            gr.Examples(BEGINNINGS, beginning, label="or one of these")
            with gr.Row():
                write = gr.Button("Write", variant="primary", min_width=80)
                another = gr.Button("Another", min_width=80)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=2):
            temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0 takes the likeliest, always")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="share of probability that is drawn from")
            length = gr.Slider(1, context - 1, min(200, context - 1), step=1, label="Length", info="tokens at most")
            seed = gr.Slider(0, SEEDS - 1, 0, step=1, label="Seed", info="the same seed tells the same story")
    story = gr.HTML(
        '<span class="quiet">The story will stand here. Point at a word to see what else it might have been.</span>',
        html_template='<div class="answer"><div class="text">${value}</div></div>',
    )
    inputs = [beginning, temperature, top_p, length, seed]
    same = {"fn": tell, "inputs": inputs, "outputs": story, "show_progress": "minimal"}
    running = [write.click(**same, api_name="story"), beginning.submit(**same, api_visibility="private")]
    next_seed = another.click(lambda seed: (seed + 1) % SEEDS, seed, seed, api_visibility="private")
    running.append(next_seed.then(**same, api_visibility="private"))
    stop.click(None, cancels=running, api_visibility="private")


def _about(teller: Storyteller, name: str) -> str:
    parameters = sum(parameter.numel() for parameter in teller.decoder.parameters())
    return f"{name}: {parameters / 1e6:,.1f} M parameters, context {teller.decoder.config.max_sequence_length:,} tokens"


def _page(teller: Storyteller, beginning: str, config: GenerationConfig) -> Iterator[str]:
    """The story as it grows, each time from its beginning; at last with its figures."""
    begun = time.perf_counter()
    text, surprise, count = f'<span class="given">{escaped(beginning)}</span>', 0.0, 0
    for come in teller.tell(beginning, config):
        if isinstance(come, Ending):
            seconds = time.perf_counter() - begun
            facts = [
                FINISHED[come.reason], f"{count} tokens", f"{count / seconds:,.0f} tokens/s",
                f"perplexity {math.exp(surprise / count):.2f}",
            ]  # fmt: skip
            if not teller.checkpoint.is_file():
                facts.append("its checkpoint is gone from the disk: this came from memory")
            figures = "".join(f"<span>{fact}</span>" for fact in facts)
            yield f'{text}{escaped(come.rest)}<span class="figures quiet">{LEGEND}{figures}</span>'
            return
        text += "".join(map(show, come))
        surprise -= sum(math.log(max(choice.probability, 1e-45)) for choice in come)  # it may be rounded to 0
        count += len(come)
        yield text
