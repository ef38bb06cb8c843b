"""Batches of reviews: padded, cut, masked and ordered as asked, the same every time."""

import tracemalloc

import numpy as np
import pytest
import torch

from classify.data import TextClassificationDataModule, TokenizedReviews, training_plan
from experiment.errors import InputError

LENGTHS = np.random.default_rng(0).integers(5, 200, size=1000)


def dataset(**options) -> TokenizedReviews:
    """Reviews of 4, 9 and 2 tokens, numbered through from 10."""
    values = {"max_length": 8, "padding": "longest", "truncation": "head"} | options
    return TokenizedReviews(
        np.arange(10, 25), np.array([0, 4, 13, 15]), np.array([0, 1, 0]), special=(1, 2, 0), **values
    )


def test_a_batch_is_padded_to_few_widths_and_tells_the_lengths_where_it_is():
    batch = dataset(max_length=7)[[2, 0]]
    assert batch["input_ids"].tolist() == [[1, 23, 24, 2, 0, 0, 0], [1, 10, 11, 12, 13, 2, 0]]
    assert batch["input_ids"].dtype == torch.int32
    assert batch["lengths"].tolist() == [4, 6]
    assert "lengths" not in dataset(max_length=4)[[2, 0]]
    assert batch["labels"].tolist() == [0, 0]
    assert batch["index"].tolist() == [2, 0]


def test_evaluation_and_training_meet_few_widths(tiny_bert):
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    reviews = TokenizedReviews(
        np.zeros(offsets[-1], dtype=np.int32), offsets, LENGTHS % 2, (1, 2, 0), 150, "longest", "head"
    )
    plan = training_plan(1000, 4, 1, reviews.lengths, (0, 0))
    assert len({reviews.lengths[batch].max() for batch in plan}) > 100
    assert {reviews[batch]["input_ids"].shape[1] for batch in plan} == {*range(16, 150, 16), 150}


def test_padding_to_the_maximum_gives_every_batch_one_width():
    assert dataset(padding="max_length")[[2]]["input_ids"].tolist() == [[1, 23, 24, 2, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        ("head", [14, 15, 16, 17, 18, 19]),
        ("tail", [17, 18, 19, 20, 21, 22]),
        ("both", [14, 15, 16, 20, 21, 22]),
    ],
)
def test_truncation_keeps_the_head_the_tail_or_both_ends(truncation, kept):
    assert dataset(truncation=truncation)[[1]]["input_ids"].tolist() == [[1, *kept, 2]]
    assert dataset(truncation=truncation)[[0]]["input_ids"].tolist() == [[1, 10, 11, 12, 13, 2, 0, 0]]


def test_evaluation_may_read_more_of_a_review_than_training(tiny_bert):
    data = TextClassificationDataModule("demo", str(tiny_bert), 48, 21, 12, max_length=10, eval_max_length=24)
    widths = {split: data.dataset(split).lengths.max() for split in ("train", "validation", "test")}
    assert widths == {"train": 10, "validation": 24, "test": 24}


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_holds_each_review_once_in_another_order_each_time(lengths):
    plan = training_plan(1000, 16, 1, lengths, (0, 0))
    assert plan == training_plan(1000, 16, 1, lengths, (0, 0))
    taken = [i for batch in plan for i in batch]
    assert len(taken) == len(set(taken)) == 992  # 62 batches of 16
    assert plan != training_plan(1000, 16, 1, lengths, (0, 1))
    assert plan != training_plan(1000, 16, 1, lengths, (1, 0))


def test_batches_by_length_pad_little_and_do_not_come_in_the_order_of_length():
    def padding(plan):
        return np.mean([1 - LENGTHS[batch].mean() / LENGTHS[batch].max() for batch in plan])

    by_length = training_plan(1000, 16, 1, LENGTHS, (0, 0))
    assert padding(by_length) < 0.2 * padding(training_plan(1000, 16, 1, None, (0, 0)))
    assert abs(np.corrcoef([LENGTHS[batch].mean() for batch in by_length], range(len(by_length)))[0, 1]) < 0.3


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_two_processes_take_together_what_one_takes_with_twice_the_batch(lengths):
    one = training_plan(1000, 32, 1, lengths, (0, 0))
    two = training_plan(1000, 16, 2, lengths, (0, 0))
    assert [set(batch) for batch in one] == [set(a) | set(b) for a, b in zip(two[::2], two[1::2], strict=True)]


@pytest.fixture
def data(tiny_bert) -> TextClassificationDataModule:
    return TextClassificationDataModule(
        "demo", str(tiny_bert), train_size=48, validation_size=21, test_size=12, max_length=40, batch_size=8
    )


def test_the_data_module_gives_the_splits_as_batches(data):
    assert data.label_names == ["negative", "positive"]
    assert data.num_labels == 2
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [8] * 6
    seen = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert sorted(seen.tolist()) == list(range(21))


def test_tokens_are_those_of_the_tokenizer_and_special_tokens_in_a_review_are_text(data):
    dataset, reviews = data.dataset("validation"), data.reviews("validation")
    for i in range(5):
        expected = data.tokenizer(reviews.texts[i], truncation=True, max_length=40)["input_ids"]
        assert dataset.sequence(i).tolist() == expected
    tokens, _ = data._tokenize(["A [SEP] B [PAD]"])
    assert not set(tokens.tolist()) & {data.tokenizer.sep_token_id, data.tokenizer.pad_token_id}


def test_tokens_are_made_once_for_all_lengths(data, tiny_bert, monkeypatch):
    folder = data.folder
    monkeypatch.setattr(TextClassificationDataModule, "_build", lambda *args: pytest.fail("tokenised again"))
    other = TextClassificationDataModule(
        "demo", str(tiny_bert), 48, 21, 12, max_length=20, padding="max_length", truncation="both"
    )
    assert other.folder == folder
    assert other.dataset("train")[[0, 1]]["input_ids"].shape == (2, 20)


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_length", 2), ("batch_size", 0), ("train_size", 1), ("label_names", ["one"]), ("label_names", ["a", "a"])],
)
def test_options_out_of_range_are_refused_by_name(option, value):
    with pytest.raises(InputError, match=f"data.{option}"):
        TextClassificationDataModule("demo", **{option: value})


def test_a_batch_larger_than_the_training_split_is_refused(data):
    data.batch_size = 49
    with pytest.raises(
        InputError, match=r"batch_size 49 on 1 process is more .* give --data.batch_size 48 or less, or more reviews"
    ):
        data.train_dataloader()


def test_tokens_take_four_bytes_each_while_they_are_made(tiny_bert):
    """Lists of Python's integers took a gigabyte more for the 50,000 reviews of IMDB."""
    data = TextClassificationDataModule("demo", str(tiny_bert))
    texts = ["a film that is good and bad and long " * 30] * 2000
    data._tokenize(texts[:1000])  # what the tokenizer keeps
    tracemalloc.start()
    tokens, _ = data._tokenize(texts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tokens) > 500_000
    assert peak < 14 * len(tokens)  # two copies for a moment, and a chunk as lists
