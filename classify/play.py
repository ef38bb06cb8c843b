"""The tab of ``tinylab play`` where classifiers label a review, side by side, and show why."""

from pathlib import Path

import gradio as gr

from classify.demo import ClassifierDemo, Prediction
from experiment.pages.token_html import escaped, message, word

MOST_CHARACTERS = 50_000  # several times the longest review of IMDB
ADAPTERS = {
    "custom": "our own LoRA", "peft": "PEFT's LoRA", "head": "the head alone", "full": "full fine-tuning",
}  # fmt: skip
REVIEWS = [
    "The plot was anything but dull. I expected something weak and got something brilliant.",
    "The acting was far from convincing. My friends found it charming; I found it tedious.",
    "A wonderful cast, a clumsy script, and an ending that saved the evening.",
]


def show(critic: ClassifierDemo, text: str) -> str:
    """One column: the predicted label, the probabilities, and the highlighted text."""
    prediction = critic.explain(text)
    label = prediction.label
    bars = "".join(
        f'<span>{escaped(name)}</span><span class="bar"><i style="width: {share:.2%}"></i></span>'
        f"<span>{share:.1%}</span>"
        for name, share in prediction.probabilities.items()
    )
    notes = [f'<span class="legend"><i style="background: var(--for)"></i>speaks for {escaped(label)}</span>',
             '<span class="legend"><i style="background: var(--against)"></i>speaks against it</span>']  # fmt: skip
    if prediction.kept < prediction.tokens:
        notes.append(
            f"<span>cut to {critic.max_length} tokens: {prediction.kept} of {prediction.tokens} were read</span>"
        )
    if not critic.checkpoint.is_file():
        notes.append("<span>its checkpoint was deleted: this came from memory</span>")
    return (
        f'<section class="answer"><h3>{escaped(critic.name)} '
        f'<span class="quiet">· {ADAPTERS[critic.module.hparams.adapter]}</span></h3>'
        f'<p class="label">{escaped(label)} <small class="quiet">{prediction.probabilities[label]:.1%}</small></p>'
        f'<div class="bars">{bars}</div><p class="text">{_coloured(text, prediction)}</p>'
        f'<p class="figures quiet">{"".join(notes)}</p></section>'
    )


def _coloured(text: str, prediction: Prediction) -> str:
    """The text with each word highlighted by what it supports; text that was not read is pale."""
    strongest = max((abs(score) for _, _, score in prediction.words), default=0.0) or 1.0
    parts, place = [], 0
    for begin, end, score in prediction.words:
        parts.append(_between(text[place:begin]))
        for_it = score >= 0
        strength = abs(score) / strongest
        title = f"spoke {'for' if for_it else 'against'} {prediction.label}: {strength:.0%} of the strongest word"
        parts.append(word(text[begin:end], "for" if for_it else "against", strength, title))
        place = end
    return "".join([*parts, _between(text[place:])])


def _between(text: str) -> str:
    return f'<span class="cut">{escaped(text)}</span>' if text.strip() else escaped(text)


def add_tabs(checkpoints: dict[str, Path]) -> None:
    """One tab for all runs, by name, inside Gradio's tabs.

    Raises:
        InputError: A checkpoint, its base model or its tokenizer cannot be read.
    """
    critics = [ClassifierDemo(checkpoint, name) for name, checkpoint in checkpoints.items()]

    def judge(text: str | None) -> str:
        if not text or not text.strip():
            return message("Type a review first, such as: I loved it.")
        if len(text) > MOST_CHARACTERS:
            return message(f"This review is too long: {len(text):,} characters, over {MOST_CHARACTERS:,}. Shorten it.")
        return f'<div class="verdicts">{"".join(show(critic, text) for critic in critics)}</div>'

    with gr.Tab("Reviews"):
        review = gr.Textbox(REVIEWS[0], label="Review", lines=4, max_lines=12)
        gr.Examples(REVIEWS, review, label="or one of these")
        ask = gr.Button("Judge", variant="primary")
        verdicts = gr.HTML('<div class="answer quiet">The answer will appear here.</div>')
        same = {"fn": judge, "inputs": review, "outputs": verdicts, "show_progress": "minimal"}
        ask.click(**same, api_name="review")
        review.submit(**same, api_visibility="private")
