"""Three splits from a source of reviews: read, checked, deduplicated, drawn with a seed, balanced."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from classify.reviews import synthetic_reviews
from experiment.errors import InputError
from experiment.sources.files import load_texts
from experiment.sources.paths import existing_file, repaired, shortened
from experiment.sources.rows import format_of, read_given

SPLITS = ("train", "validation", "test")


@dataclass
class Reviews:
    """Some reviews: `texts`, and `labels` (N,) as class ids, -1 if unknown."""

    texts: list[str]
    labels: np.ndarray


def read_texts(source: list[str] | str) -> list[str]:
    """The texts to classify: a list, a file (one text per line, or strings or a column ``text``), or a single text.

    Raises:
        InputError: the file does not exist, or a text is empty.
    """
    if isinstance(source, str):
        file = existing_file(source)
        if file is None and len(source) < 1000 and format_of(Path(source)):
            raise InputError(
                f"data.texts {source!r} does not exist: expected a file with one text per line or a column text, or "
                "a list of texts"
            )
        if file is None and source.lstrip().startswith('["') and not source.rstrip().endswith("]"):
            raise InputError(
                f"data.texts {shortened(source)!r}: the list does not end; expected a ] after the last text"
            )
        source = [source] if file is None else read_given(file, "text", f"data.texts {source!r}")
    if not source:
        raise InputError("data.texts is empty: expected at least one text")
    _refuse_empty(source, "data.texts")
    return [repaired(text) for text in source]


def _refuse_empty(texts: Sequence[Any], where: str) -> None:
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: review {row} is empty or not text ({text!r}): remove it or fill it in")


def draw_splits(
    path: str, sizes: dict[str, int | None], label_names: list[str] | None, seed: int, revision: str | None = None
) -> tuple[list[str], dict[str, Reviews]]:
    """Names of the classes, and train, validation and test drawn from a source: balanced, and no text in two of them.

    Texts that differ only in case and white space count as equal. A text that occurs in several splits of
    the source stays in test rather than validation, and in validation rather than train. Test reviews without labels
    (no such column, or all -1) are kept for prediction; if only some have labels, the others are left out.

    Raises:
        InputError: whatever `load_texts` refuses, an empty review, an invalid label, too few reviews.
    """
    pools: dict[str, Reviews] = {}
    seen: set[bytes] = set()
    read = 0
    names = label_names
    raw = {split: load_texts(path, split, ["text", "label"], synthetic_reviews, revision) for split in SPLITS[:2]}
    try:
        raw["test"] = load_texts(path, "test", ["text", "label"], synthetic_reviews, revision)
    except InputError:  # perhaps the column is missing; any other error is raised again
        raw["test"] = load_texts(path, "test", ["text"], synthetic_reviews, revision)
    if raw["train"] is None:
        raise InputError(f"data.path {path} has no train split")
    names = names or _class_names(raw["train"], path)
    for split in reversed(SPLITS):
        if raw[split] is not None:
            texts = list(raw[split]["text"])
            where = f"{path} ({split})"
            _refuse_empty(texts, where)
            read += len(texts)
            labels = raw[split]["label"] if "label" in raw[split].column_names else [None] * len(texts)
            known = [split != "test" or _plain(label) not in (None, -1) for label in labels]
            if any(known):
                texts, labels = list(compress(texts, known)), list(compress(labels, known))
                pools[split] = _without_duplicates(texts, _class_ids(labels, names, where), seen)
            else:
                pools[split] = _without_duplicates(texts, np.full(len(texts), -1), seen)
    drawn, short = {}, []
    left = {split: _shuffled_by_class(pool, len(names), seed) for split, pool in pools.items()}
    for split in reversed(SPLITS):
        source = split if split in pools else "train"
        if (pools[source].labels < 0).all():
            taken = np.random.default_rng(seed).permutation(len(pools[source].texts))[: sizes[split]]
        elif (taken := _take(left[source], sizes[split], whole=source == split)) is None:
            short.append(split)
            continue
        order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(taken)
        drawn[split] = Reviews([pools[source].texts[i] for i in order], pools[source].labels[order])
    if short:
        raise InputError(_too_few(path, pools, names, sizes, short, some_removed=len(seen) < read))
    return names, drawn


def _too_few(
    path: str,
    pools: dict[str, Reviews],
    names: list[str],
    sizes: dict[str, int | None],
    short: list[str],
    some_removed: bool,
) -> str:
    """The message if the splits `short` cannot be drawn: the sizes, the available reviews, and possible sizes."""
    asked = " and ".join(f"data.{split}_size {sizes[split] or 'null'}" for split in SPLITS if split in short)
    labels = {split: pools[split].labels for split in SPLITS if split in pools}
    counts = {split: np.bincount(of[of >= 0], minlength=len(names)) for split, of in labels.items()}
    there = "; ".join(
        f"{split}: {', '.join(f'{count:,} {name}' for name, count in zip(names, found, strict=True))}"
        for split, found in counts.items()
    )
    fewest, least = counts["train"].min(), 1 + len(SPLITS) - len(pools)
    cure = f"expected at least {least} of each class in train"
    if fewest >= least:  # null takes all that are left; splits that the source lacks take a tenth of train each
        tenth = len(names) * max(1, fewest // 10)
        flags = (f"--data.{split}_size {'null' if split in pools else tenth}" for split in SPLITS)
        cure = f"give {' '.join(flags)}, where null takes all that are left"
    reviews = "different reviews (ignoring case and spaces)" if some_removed else "reviews"
    return f"{asked}: {path} holds fewer {reviews} ({there}); {cure}"


def _class_names(dataset: Any, path: str) -> list[str]:
    """The dataset's class names, else the words it uses as labels, else negative and positive for 0 and 1."""
    if names := getattr(dataset.features["label"], "names", None):
        return list(names)
    values = set(map(_plain, dataset["label"])) - {None}
    if all(isinstance(value, str) for value in values):
        if not 2 <= len(values) <= 100:
            labels = "1 label" if len(values) == 1 else f"{len(values)} different labels"
            raise InputError(f"{path}: the column label holds {labels}: expected 2 to 100 classes")
        return sorted(values)
    return ["negative", "positive"]


def _plain(label: Any) -> str | float | None:
    """A label as a word or a number, however the file writes it: 1, 1.0 and "1" are the same, as are true and "true";
    None if it is missing."""
    if isinstance(label, str):
        label = label.strip()
        try:
            label = float(label) if label[-1:].isdigit() else label or None
        except ValueError:
            return label
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return int(label)
    return None if label != label else label


def _class_ids(labels: Sequence[Any], names: list[str], where: str) -> np.ndarray:
    ids = {name: i for i, name in enumerate(names)}
    classes = np.empty(len(labels), dtype=np.int64)
    for row, label in enumerate(labels):
        plain = _plain(label)
        known = ids.get(label if label in ids else plain, plain)
        if not isinstance(known, int) or not 0 <= known < len(names):
            expected = ", ".join(f"{i} or {name}" for i, name in enumerate(names))
            review = f"the label {plain!r} of review {row + 1} is not a class"
            raise InputError(
                f"{where}: {f'review {row + 1} has no label' if plain is None else review}: expected {expected}; "
                "name other classes with data.label_names"
            )
        classes[row] = known
    return classes


def _without_duplicates(texts: list[str], labels: np.ndarray, seen: set[bytes]) -> Reviews:
    kept = []
    for i, text in enumerate(texts):
        digest = blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(i)
    return Reviews([texts[i] for i in kept], labels[kept])


def _shuffled_by_class(pool: Reviews, num_labels: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(pool.labels == label)) for label in range(num_labels)]


def _take(left: list[np.ndarray], size: int | None, whole: bool) -> np.ndarray | None:
    """Positions of `size` reviews, as balanced as possible, taken out of `left`; size None takes all, which only
    `whole` allows. Returns None if there are too few."""
    if size is None and not whole:
        return None
    wanted = [len(indices) for indices in left]
    if size is not None:
        wanted = [size // len(left) + (label < size % len(left)) for label in range(len(left))]
    pairs = list(zip(left, wanted, strict=True))
    if not sum(wanted) or any(count > len(indices) for indices, count in pairs):
        return None
    left[:] = [indices[count:] for indices, count in pairs]
    return np.concatenate([indices[:count] for indices, count in pairs])
