"""The tab of ``tinylab play`` where a language model continues a text, token by token."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from experiment.pages.token_html import Row, escaped, message, word
from lm.demo import Choice, Ending, LanguageModelDemo
from lm.model.config import GenerationConfig

SEEDS = 1000
BEGINNINGS = ["Once upon a time", "One day, a little girl named Lily", "Tom had a red ball.", "The dog was sad because"]
FINISHED = {"eos": "the story has ended", "stop": "the story has ended", "length": "stopped at the token limit"}
LEGEND = '<span class="legend">certain <i class="rare"></i> unlikely</span>'


def show(choice: Choice) -> str:
    """One token as a word, highlighted by how unlikely it was."""
    rows = [
        Row(name.replace("\n", "↵"), probability, _percent(probability, drawn), taken)
        for name, probability, drawn, taken in choice.alternatives
    ]
    return word(choice.text, "rare", 1 - choice.probability, "the model's probability → after filters", rows)


def _percent(probability: float, drawn: float) -> str:
    return f"{probability:.1%} → {drawn:.1%}"


def add_tabs(checkpoints: dict[str, Path]) -> None:
    """One tab per run, by name, inside Gradio's tabs.

    Raises:
        InputError: A checkpoint or its tokenizer cannot be read.
    """
    for name, checkpoint in checkpoints.items():
        with gr.Tab("Stories" if len(checkpoints) == 1 else f"Stories: {name}"):
            _fill(LanguageModelDemo(checkpoint), name)


def _fill(teller: LanguageModelDemo, name: str) -> None:
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
            temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0 always takes the most likely")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="share of the probability to sample from")
            length = gr.Slider(1, context - 1, min(200, context - 1), step=1, label="Length", info="most new tokens")
            seed = gr.Slider(0, SEEDS - 1, 0, step=1, label="Seed", info="the same seed gives the same story")
    story = gr.HTML(
        '<span class="quiet">The story will appear here. Point at a word to see its alternatives.</span>',
        html_template='<div class="answer"><div class="text">${value}</div></div>',
    )
    inputs = [beginning, temperature, top_p, length, seed]
    same = {"fn": tell, "inputs": inputs, "outputs": story, "show_progress": "minimal"}
    running = [write.click(**same, api_name="story"), beginning.submit(**same, api_visibility="private")]
    next_seed = another.click(lambda seed: (seed + 1) % SEEDS, seed, seed, api_visibility="private")
    running.append(next_seed.then(**same, api_visibility="private"))
    stop.click(None, cancels=running, api_visibility="private")


def _about(teller: LanguageModelDemo, name: str) -> str:
    parameters = sum(parameter.numel() for parameter in teller.decoder.parameters())
    return f"{name}: {parameters / 1e6:,.1f} M parameters, context {teller.decoder.config.max_sequence_length:,} tokens"


def _page(teller: LanguageModelDemo, beginning: str, config: GenerationConfig) -> Iterator[str]:
    """The growing story, each time from its beginning; finally with its statistics."""
    begun = time.perf_counter()
    text, surprise, count = f'<span class="given">{escaped(beginning)}</span>', 0.0, 0
    for come in teller.stream(beginning, config):
        if isinstance(come, Ending):
            seconds = time.perf_counter() - begun
            facts = [
                FINISHED[come.reason], f"{count} tokens", f"{count / seconds:,.0f} tokens/s",
                f"perplexity {math.exp(surprise / count):.2f}",
            ]  # fmt: skip
            if not teller.checkpoint.is_file():
                facts.append("its checkpoint was deleted: this came from memory")
            figures = "".join(f"<span>{fact}</span>" for fact in facts)
            yield f'{text}{escaped(come.rest)}<span class="figures quiet">{LEGEND}{figures}</span>'
            return
        text += "".join(map(show, come))
        surprise -= sum(math.log(max(choice.probability, 1e-45)) for choice in come)  # it may be rounded to 0
        count += len(come)
        yield text
