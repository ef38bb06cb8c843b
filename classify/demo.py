"""A trained classifier for use: it classifies a text and shows which words support the label."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
import yaml

from classify.data import TokenizedReviews
from classify.module import ReviewClassifier
from classify.pretrained import load_tokenizer
from experiment.errors import InputError
from experiment.runs.reading import read_checkpoint
from experiment.runs.run import CONFIG
from experiment.sources.paths import texts_of


@dataclass
class Prediction:
    """A classifier's prediction for a text.

    Args:
        probabilities: Of each class, by its name.
        words: (begin, end, score) in characters of each word that was read: the score is what the word adds to the
            log-odds of the most likely class, to first order.
        tokens: Of the whole text, without special tokens.
        kept: Number of tokens that were read.
    """

    probabilities: dict[str, float]
    words: list[tuple[int, int, float]]
    tokens: int
    kept: int

    @property
    def label(self) -> str:
        return max(self.probabilities, key=self.probabilities.get)


class ClassifierDemo:
    """A classifier from a checkpoint, safe for concurrent use: it has no mutable state."""

    def __init__(self, checkpoint: Path, name: str = "") -> None:
        """
        Args:
            checkpoint: A file that fit has written, in its run's folder.
            name: Distinguishes it from others on one page.

        Raises:
            InputError: The checkpoint, its base model or its tokenizer cannot be read.
        """
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
            raise InputError(f"{file} does not say how {checkpoint} reads texts: expected the run's own") from error

    @overload
    def classify(self, text: str) -> dict[str, float]: ...

    @overload
    def classify(self, text: Iterable[str]) -> list[dict[str, float]]: ...

    def classify(self, text: str | Iterable[str]) -> dict[str, float] | list[dict[str, float]]:
        """The probability of each class, by name, most likely first; for several texts, a list of these.

        Raises:
            TypeError: It is neither a text nor a list of texts.
        """
        found = [self.explain(one).probabilities for one in texts_of(text)]
        ordered = [dict(sorted(one.items(), key=lambda item: -item[1])) for one in found]
        return ordered[0] if isinstance(text, str) else ordered

    def explain(self, text: str) -> Prediction:
        """Classify a text, and find the words that support its class: gradient times input, on the embeddings.

        The log-odds of the most likely class are differentiated by each token's embedding; the product with that
        embedding, summed, is the token's share (Shrikumar et al. 2017, arXiv:1605.01713, section 2). The pieces of a
        word are added up.
        """
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoded["input_ids"], dtype=np.int64)
        # The class that prepares the training's reviews knows which tokens are read.
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
        return Prediction(probabilities, list(words.values()), len(ids), len(places))

    def _read(self, tokens: np.ndarray, special: tuple[int, int, int]) -> np.ndarray:
        """The tokens (T,) as the model sees them: between special ones, and cut to the run's length."""
        reviews = TokenizedReviews(
            tokens, np.array([0, len(tokens)]), np.array([-1]), special, self.max_length, "longest", self.truncation
        )
        return reviews.sequence(0)
