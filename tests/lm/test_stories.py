"""The embedded corpus: always the same, distinct, clean English for small children."""

import hashlib
import re
from random import Random

import pytest

from lm.data.demo_letters import write_letters
from lm.data.demo_stories import PLOTS, SIZES, _plot, demo_stories, demo_texts, write_story

TRAIN, VALIDATION = demo_texts("train"), demo_texts("validation")
EVERY = TRAIN + VALIDATION


def test_splits_have_their_size_and_share_no_story():
    assert (len(TRAIN), len(VALIDATION)) == (SIZES["train"], SIZES["validation"]) == (12_000, 500)
    assert len(set(EVERY)) == len(EVERY)


def test_stories_are_the_same_in_every_process():
    assert [write_story(Random(1)) for _ in range(2)] == [write_story(Random(1))] * 2
    demo_texts.cache_clear()
    assert demo_texts("validation") == VALIDATION


def test_stories_and_letters_are_those_that_results_were_measured_on():
    letters = [letter for split in ("train", "validation") for letter in write_letters(split)]
    stories = "\0".join([*EVERY, *letters])
    assert (
        hashlib.sha256(stories.encode()).hexdigest()
        == "aa4bd9656e9aacbecd0388c3feb9e32f45ce5dc41c1fd8e18bd41f6d518584d3"
    )


def test_data_set_has_a_text_column_and_no_test_split():
    assert demo_stories("validation")["text"][:] == VALIDATION
    assert demo_stories("test") is None


def test_stories_are_as_long_as_they_should_be():
    assert all(80 <= len(story.split()) <= 200 for story in EVERY)
    assert all(len(story.split("\n")) >= 3 for story in EVERY)


def test_stories_use_few_words_and_plain_characters():
    words = set(re.findall(r"[a-z']+", " ".join(EVERY).lower()))
    assert 700 < len(words) < 1_500
    assert set("".join(EVERY)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?:;'\"-\n")


@pytest.mark.parametrize(
    ("slip", "pattern"),
    [
        ("a before a vowel", r"\b[Aa] [aeiou]"),
        ("an before a consonant", r"\b[Aa]n [^aeio]"),
        ("space before a mark or doubled", r" [.,!?]|  | \n|\n |\n\n"),
        ("small letter after a full stop", r"\. \"?[a-z]|\n\"?[a-z]"),
        ("capital in the middle without a mark", r"[a-z] (He|She|They|The|Then|It)\b"),
        ("doubled mark", r"[.,!?][.,!?]"),
        ("doubled word", r"\b(\w+) \1\b"),
        ("paragraph without an end", r"[^.!?\"]\n|[^.!?\"]$"),
    ],
)
def test_there_is_no(slip, pattern):
    found = [match.group() for story in EVERY for match in re.finditer(pattern, story)]
    assert not found, (slip, found[:3])


def test_quotes_close_within_their_paragraph():
    assert all(paragraph.count('"') % 2 == 0 for story in EVERY for paragraph in story.split("\n"))


def test_no_plot_fixes_a_pronoun():
    """Pronouns of the cast come from the cast, so that they agree; "it" is for things."""
    for plot in PLOTS:
        fixed = re.sub(r"\{\w+\}", "", plot)
        assert not re.findall(r"\b(he|him|his|she|hers|himself|herself)\b", fixed, re.IGNORECASE), plot[:40]


def test_every_plot_and_every_row_of_its_table_appears():
    for plot in PLOTS:
        _, rows, _ = _plot(plot)
        for row in rows:
            cells = [cell for cell in row.values() if "{" not in cell]
            assert any(all(cell in story for cell in cells) for story in TRAIN), row
