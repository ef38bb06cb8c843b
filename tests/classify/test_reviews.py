"""The synthetic reviews: repeatable, balanced, different from each other, and fair to words alone."""

import hashlib
import json
import re
from collections import Counter

import pytest

from classify.reviews import SIZES, synthetic_reviews


def test_each_split_is_the_same_every_time_balanced_and_without_duplicates():
    for split, size in SIZES.items():
        reviews = synthetic_reviews(split)
        assert reviews["text"][:50] == synthetic_reviews.__wrapped__(split)["text"][:50]
        assert Counter(reviews["label"]) == {0: size // 2, 1: size // 2}
        assert len(set(reviews["text"])) == size
        assert reviews.features["label"].names == ["negative", "positive"]


@pytest.mark.parametrize(
    ("split", "digest"), [("train", "853899effc2e"), ("validation", "a4111fe8b440"), ("test", "1d048f3f15c2")]
)
def test_the_reviews_are_those_that_the_published_results_were_measured_on(split: str, digest: str) -> None:
    reviews = synthetic_reviews(split)
    content = json.dumps([list(reviews["text"]), list(reviews["label"])])
    assert hashlib.sha256(content.encode()).hexdigest().startswith(digest)


def test_no_word_tells_the_label_by_itself():
    counts = [Counter(), Counter()]
    reviews = synthetic_reviews("train")
    for text, label in zip(reviews["text"], reviews["label"], strict=True):
        counts[label].update(set(re.findall(r"[a-z']+", text.lower())))
    for word in counts[0] | counts[1]:
        negative, positive = counts[0][word] + 1, counts[1][word] + 1
        if negative + positive > 400:
            assert 1 / 3 < negative / positive < 3, word


def test_sentences_are_well_formed():
    for text in synthetic_reviews("test")["text"]:
        assert re.fullmatch(r"[A-Z][^{}]*[.?]", text), text
        assert "  " not in text
        assert not re.search(r"\ba [aeiou]", text), text
        assert all(sentence[0].isupper() for sentence in re.split(r"(?<=[.?]) ", text)), text
