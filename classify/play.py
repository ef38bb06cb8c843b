"""The tab of ``python -m experiment.play`` where classifiers judge a review, side by side, and show why."""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
import torch
import yaml

from classify.data import TokenizedReviews
from classify.module import ReviewClassifier
from classify.pretrained import load_tokenizer
from experiment.errors import InputError
from experiment.run import CONFIG, read_checkpoint
from experiment.words import escaped, message, word

MOST_CHARACTERS = 50_000  # several times the longest review of IMDB
ADAPTERS = {
    "custom": "LoRA by hand", "peft": "LoRA by PEFT", "head": "the head alone", "none": "full fine-tuning",
}  # fmt: skip
REVIEWS = [
    "The plot was anything but dull. I expected something weak and got something brilliant.",
    "The acting was far from convincing. My friends found it charming; I found it tedious.",
    "A wonderful cast, a clumsy script, and an ending that saved the evening.",
]


@dataclass
class Verdict:
    """What a classifier says of a text.

    Args:
        probabilities: Of each class, by its name.
        words: (begin, end, score) of each word of the text that was read: the score is what the word adds to the
            log-odds of the likeliest class, to first order. Characters.
        tokens: Of the whole text, without special tokens.
        kept: As many of them were read.
    """

    probabilities: dict[str, float]
    words: list[tuple[int, int, float]]
    tokens: int
    kept: int

    @property
    def label(self) -> str:
        return max(self.probabilities, key=self.probabilities.get)


class Critic:
    """A classifier from a checkpoint, for any number of visitors at once: nothing of it changes."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        self.name, self.checkpoint = name, checkpoint
        content = read_checkpoint(checkpoint)
        self.module = ReviewClassifier(**content["hyper_parameters"])
        self.module.on_load_checkpoint(content)
        self.module.load_state_dict(content["state_dict"], strict=False)
        self.module.eval()
        file = checkpoint.resolve().parent.parent / CONFIG
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]
            self.max_length = data.get("eval_max_length") or data["max_length"]
            self.truncation = data["truncation"]
            self.tokenizer = load_tokenizer(data["tokenizer"] or self.module.hparams.name)
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"{file} does not tell how {checkpoint} reads texts: expected the run's own") from error

    def judge(self, text: str) -> Verdict:
        """Classify a text, and find the words that spoke for its class: gradient times input, on the embeddings.

        The log-odds of the likeliest class are differentiated by the embedding of each token; the product with that
        embedding, summed, is the token's share (Shrikumar et al. 2017, arXiv:1605.01713, section 2). The pieces of a
        word are added up.
        """
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        # Which tokens are read is told by the class that prepares the training's reviews.
        special = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id)
        places = self._read(np.arange(len(ids)), (-1, -1, -1))[1:-1]
        input_ids = torch.from_numpy(self._read(ids, special))[None]
        embeddings = self.module.model.get_input_embeddings()(input_ids).detach().requires_grad_()
        logits = self.module.model(inputs_embeds=embeddings, attention_mask=torch.ones_like(input_ids)).logits[0]
        label = logits.argmax()
        others = torch.cat([logits[:label], logits[label + 1 :]])
        (gradient,) = torch.autograd.grad(logits[label] - others.logsumexp(0), embeddings)
        scores = (gradient * embeddings).sum(-1)[0, 1:-1].tolist()

        words: dict[int, tuple[int, int, float]] = {}
        for place, score in zip(places.tolist(), scores, strict=True):
            (begin, end), number = encoded["offset_mapping"][place], encoded.word_ids()[place]
            first, _, before = words.get(number, (begin, end, 0.0))
            words[number] = (first, end, before + score)
        probabilities = dict(zip(self.module.hparams.label_names, logits.softmax(0).tolist(), strict=True))
        return Verdict(probabilities, list(words.values()), len(ids), len(places))

    def _read(self, tokens: np.ndarray, special: tuple[int, int, int]) -> np.ndarray:
        """The tokens (T,) as the model sees them: between special ones, and cut to the run's length."""
        reviews = TokenizedReviews(
            tokens, np.array([0, len(tokens)]), np.array([-1]), special, self.max_length, "longest", self.truncation
        )
        return reviews.sequence(0)


def show(critic: Critic, text: str) -> str:
    """One column: the verdict, its probabilities, and the text in colours."""
    verdict = critic.judge(text)
    label = verdict.label
    bars = "".join(
        f'<span>{escaped(name)}</span><span class="bar"><i style="width: {share:.2%}"></i></span>'
        f"<span>{share:.1%}</span>"
        for name, share in verdict.probabilities.items()
    )
    notes = [f'<span class="legend"><i style="background: var(--for)"></i>spoke for {escaped(label)}</span>',
             '<span class="legend"><i style="background: var(--against)"></i>spoke against</span>']  # fmt: skip
    if verdict.kept < verdict.tokens:
        notes.append(f"<span>cut to {critic.max_length} tokens: {verdict.kept} of {verdict.tokens} were read</span>")
    if not critic.checkpoint.is_file():
        notes.append("<span>its checkpoint is gone from the disk: this came from memory</span>")
    return (
        f'<section class="answer"><h3>{escaped(critic.name)} '
        f'<span class="quiet">· {ADAPTERS[critic.module.hparams.adapter]}</span></h3>'
        f'<p class="label">{escaped(label)} <small class="quiet">{verdict.probabilities[label]:.1%}</small></p>'
        f'<div class="bars">{bars}</div><p class="text">{_coloured(text, verdict)}</p>'
        f'<p class="figures quiet">{"".join(notes)}</p></section>'
    )


def _coloured(text: str, verdict: Verdict) -> str:
    """The text with its words on grounds that tell what they spoke for; what was not read is pale."""
    strongest = max((abs(score) for _, _, score in verdict.words), default=0.0) or 1.0
    parts, place = [], 0
    for begin, end, score in verdict.words:
        parts.append(_between(text[place:begin]))
        for_it = score >= 0
        strength = abs(score) / strongest
        title = f"spoke {'for' if for_it else 'against'} {verdict.label}: {strength:.0%} of the strongest word"
        parts.append(word(text[begin:end], "for" if for_it else "against", strength, title))
        place = end
    return "".join([*parts, _between(text[place:])])


def _between(text: str) -> str:
    return f'<span class="cut">{escaped(text)}</span>' if text.strip() else escaped(text)


def add_tabs(checkpoints: dict[str, Path]) -> None:
    """One tab for all runs, by name, inside of Gradio's tabs.

    Raises:
        InputError: A checkpoint, its base model or its tokenizer cannot be read.
    """
    critics = [Critic(name, checkpoint) for name, checkpoint in checkpoints.items()]

    def judge(text: str | None) -> str:
        if not text or not text.strip():
            return message("Type a review first, such as: I loved it.")
        if len(text) > MOST_CHARACTERS:
            return message(f"This review is too long: {len(text):,} characters of at most {MOST_CHARACTERS:,}. Cut it.")
        return f'<div class="verdicts">{"".join(show(critic, text) for critic in critics)}</div>'

    with gr.Tab("Reviews"):
        review = gr.Textbox(REVIEWS[0], label="Review", lines=4, max_lines=12)
        gr.Examples(REVIEWS, review, label="or one of these")
        ask = gr.Button("Judge", variant="primary")
        verdicts = gr.HTML('<div class="answer quiet">The verdict will stand here.</div>')
        same = {"fn": judge, "inputs": review, "outputs": verdicts, "show_progress": "minimal"}
        ask.click(**same, api_name="review")
        review.submit(**same, api_visibility="private")
