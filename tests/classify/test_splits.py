"""Drawing the splits: balanced, disjoint, repeatable, and strict with what is no review."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from classify.splits import draw_splits, read_texts
from experiment.errors import InputError

SIZES = {"train": 40, "validation": 10, "test": 10}


def write_source(folder: Path, **splits: list[tuple[str, object]]) -> str:
    for split, rows in splits.items():
        lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


def numbered(count: int, first: int = 0) -> list[tuple[str, int]]:
    """Sorted by label, as the hub's file is."""
    return [(f"Review number {i}.", int(i >= first + count // 2)) for i in range(first, first + count)]


def draw(path: str, sizes: dict = SIZES, names: list[str] | None = None, seed: int = 0):
    return draw_splits(path, sizes, names, seed)


def test_splits_of_a_source_sorted_by_label_are_balanced_shuffled_and_of_the_asked_sizes(tmp_path):
    names, drawn = draw(write_source(tmp_path, train=numbered(100), test=numbered(40, first=100)))
    assert names == ["negative", "positive"]
    for split, size in SIZES.items():
        assert Counter(drawn[split].labels.tolist()) == {0: size // 2, 1: size // 2}
        assert drawn[split].labels.tolist() != sorted(drawn[split].labels.tolist())


def test_no_text_stands_in_two_splits_whatever_its_case_and_spaces(tmp_path):
    train = [*numbered(100), ("REVIEW  number 120. ", 1), ("Review number 121.\n", 1), ("review number 3.", 0)]
    path = write_source(tmp_path, train=train, validation=numbered(30, first=90), test=numbered(40, first=110))
    _, drawn = draw(path, {"train": None, "validation": None, "test": None})
    normal = [" ".join(t.lower().split()) for reviews in drawn.values() for t in reviews.texts]
    assert len(normal) == len(set(normal)) == 150
    assert {split: len(reviews.texts) for split, reviews in drawn.items()} == {
        "train": 90,
        "validation": 20,
        "test": 40,
    }


def test_the_seed_decides_the_draw_and_a_larger_train_size_keeps_the_other_splits(tmp_path):
    path = write_source(tmp_path, train=numbered(100))
    first, again, other = draw(path)[1], draw(path)[1], draw(path, seed=1)[1]
    assert first["train"].texts == again["train"].texts != other["train"].texts
    larger = draw(path, SIZES | {"train": 60})[1]
    assert larger["validation"].texts == first["validation"].texts
    assert larger["test"].texts == first["test"].texts
    assert set(larger["train"].texts) > set(first["train"].texts)


def test_words_as_labels_become_classes_and_any_number_of_them(tmp_path):
    rows = [(f"Review {i}", ["good", "bad", "mixed"][i % 3]) for i in range(60)]
    names, drawn = draw(write_source(tmp_path, train=rows), {"train": 30, "validation": 6, "test": 6})
    assert names == ["bad", "good", "mixed"]
    assert Counter(drawn["train"].labels.tolist()) == {0: 10, 1: 10, 2: 10}
    for text, label in zip(drawn["train"].texts, drawn["train"].labels, strict=True):
        assert ["good", "bad", "mixed"][int(text.split()[1]) % 3] == names[label]


@pytest.mark.parametrize(
    ("file", "labels", "expected"),
    [("csv", ["0", "1"], ["negative", "positive"]), ("csv", ["true", "false"], ["false", "true"]),
     ("csv", ["1.0", "0.0"], ["negative", "positive"]), ("csv", ["NA", "None"], ["NA", "None"]),
     ("jsonl", [True, False], ["false", "true"]), ("parquet", [1.0, 0.0], ["negative", "positive"]),
     ("parquet", [True, False], ["false", "true"])],
)  # fmt: skip
def test_labels_are_the_same_however_they_are_written(tmp_path, file, labels, expected):
    rows = [{"text": f"NA {i}", "label": labels[i % 2]} for i in range(60)]
    if file == "csv":
        (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    elif file == "jsonl":
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    names, drawn = draw(str(tmp_path))
    assert names == expected
    by_name = {"0": "negative", "1": "positive", "0.0": "negative", "1.0": "positive"}
    for text, label in zip(drawn["train"].texts, drawn["train"].labels, strict=True):
        written = str(labels[int(text.split()[1]) % 2])
        assert names[label] == by_name.get(written, written if file == "csv" else written.lower())


@pytest.mark.parametrize("missing", ["", "nan"])
def test_one_missing_label_names_its_own_review(tmp_path, missing):
    lines = [f"Review {i},{i % 2 if i != 6 else missing}" for i in range(9)]
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(lines))
    what = "the label 'nan' of review 7 is not a class" if missing else "review 7 has no label: expected 0 or negative"
    with pytest.raises(InputError, match=what):
        draw(str(tmp_path), names=["negative", "positive"])


def test_names_given_by_hand_decide_which_class_is_which(tmp_path):
    rows = [(f"Review {i}", ["yes", "no"][i % 2]) for i in range(60)]
    names, drawn = draw(write_source(tmp_path, train=rows), names=["yes", "no"])
    assert names == ["yes", "no"]
    assert all(int(t.split()[1]) % 2 == y for t, y in zip(drawn["train"].texts, drawn["train"].labels, strict=True))


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([("a", 0), ("b", 2)], None, "label 2 of review 2 is not a class: expected 0 or negative, 1 or positive"),
        ([("a", 0), ("b", -1)], None, "label -1 of review 2"),
        ([("a", 0), ("b", None)], None, "review 2 has no label"),
        ([("a", 0.5), ("b", 1.0)], None, "label 0.5 of review 1"),
        ([("a", "good"), ("b", "bad")], ["good", "poor"], "label 'bad' of review 2"),
        ([("a", "good"), ("b", "good")], None, "1 label: expected 2 to 100"),
        ([("a", 0), ("  ", 1)], None, "review 2 is empty"),
        ([("a", 0), (None, 1)], None, "review 2 is empty or not text"),
    ],
)
def test_what_is_no_review_or_no_class_is_named_with_its_row(tmp_path, rows, names, message):
    path = write_source(tmp_path, train=rows)
    with pytest.raises(InputError, match=message):
        draw(path, names=names)


def test_a_text_file_is_told_to_have_no_labels(tmp_path):
    (tmp_path / "train.txt").write_text("Good.\n\nBad.\n")
    message = "train.txt has no label, since it is plain text: expected a CSV or JSON lines with the columns text and "
    with pytest.raises(InputError, match=message):
        draw(str(tmp_path / "train.txt"))


def test_a_missing_column_is_named(tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["review", "label"], ["Good.", 1]])
    with pytest.raises(InputError, match="no column 'text'"):
        draw(str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "asked"),
    [
        (SIZES | {"validation": 40}, "data.train_size 40 and data.validation_size 40: "),
        (SIZES | {"train": None, "validation": None}, "data.validation_size null: "),
        ({"train": None, "validation": 30, "test": 4}, "data.train_size null: "),
    ],
)
def test_sizes_that_are_too_large_are_told_at_once_with_those_that_can_be_had(tmp_path, sizes, asked):
    path = write_source(tmp_path, train=numbered(30), test=numbered(12, first=30))
    cure = "--data.train_size null --data.validation_size 2 --data.test_size null"
    with pytest.raises(InputError) as error:
        draw(path, sizes)
    assert asked in str(error.value) and "(train: 15 negative, 15 positive; test: 6 " in str(error.value)
    assert f"give {cure}, where null takes all" in str(error.value)
    _, drawn = draw(path, {"train": None, "validation": 2, "test": None})
    assert [len(drawn[split].texts) for split in SIZES] == [28, 2, 12]


def test_source_of_too_few_reviews_for_any_split_is_told_so(tmp_path):
    with pytest.raises(InputError, match="expected at least 3 of each class in train"):
        draw(write_source(tmp_path, train=numbered(4)))


def test_source_that_has_too_few_once_duplicates_are_gone_is_told_so(tmp_path):
    repeated = [(f" {text.upper()}", label) for text, label in numbered(4)]
    with pytest.raises(InputError, match="holds fewer different reviews"):
        draw(write_source(tmp_path, train=numbered(4) + repeated))


def test_texts_to_classify_come_as_a_list_a_file_or_a_single_text(tmp_path):
    (tmp_path / "lines.txt").write_text("One.\nTwo.\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "Three."}\n')
    assert read_texts(["A.", "B."]) == ["A.", "B."]
    assert read_texts(str(tmp_path / "lines.txt")) == ["One.", "Two."]
    assert read_texts(str(tmp_path / "rows.jsonl")) == ["Three."]
    assert read_texts("A film to forget.") == ["A film to forget."]
    (tmp_path / "gap.txt").write_text("One.\n\nThree.\n")
    assert read_texts(str(tmp_path / "gap.txt")) == ["One.", "Three."]
    assert read_texts("I loved it. " * 40) == ["I loved it. " * 40]
    assert read_texts("~ a classic") == ["~ a classic"]
    assert read_texts("nul\0") == ["nul\0"]
    assert read_texts(["Tom \ud83d ran"]) == ["Tom \ufffd ran"]
    with pytest.raises(InputError, match=r"data\.texts"):
        read_texts("missing.txt")
    with pytest.raises(InputError, match="the list does not end"):
        read_texts('["A film to forget."')
    with pytest.raises(InputError, match="empty"):
        read_texts([])


def test_the_real_reviews_are_drawn_balanced_and_disjoint(shared):
    sizes = {"train": 5000, "validation": 1000, "test": 1000}
    names, drawn = draw(str(shared / "data" / "imdb"), sizes)
    assert names == ["negative", "positive"]
    texts = [text for reviews in drawn.values() for text in reviews.texts]
    assert len(set(texts)) == 7000
    assert all(reviews.labels.mean() == 0.5 for reviews in drawn.values())
