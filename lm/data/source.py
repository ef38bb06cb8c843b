"""The stories of one `--data.path`: its splits, their token ids as files, and a tokenizer trained on them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiment.errors import InputError
from experiment.progress import progress
from experiment.sources.files import datasets_library, load_texts, local_files, source_fingerprint
from experiment.sources.rows import layout_note
from experiment.sources.streams import blocks, stream_texts
from lm.data.bpe import train_tokenizer
from lm.data.completions import Rows, encode_stories, plain_texts, story_columns
from lm.data.demo_stories import demo_stories
from lm.data.tokenizer import StoryTokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Texts

CHUNK = 2_000  # stories tokenized at a time; bounds the memory
TRAINING_STORIES = 200_000  # maximum number to train a tokenizer on


class StorySource:
    """Where stories come from.

    Args:
        path: As ``--data.path``.
        revision: As ``--data.revision``.
        streaming: Read splits without downloading the whole source.
    """

    def __init__(self, path: str, revision: str | None, streaming: bool) -> None:
        self.path, self.revision, self.streaming = path, revision, streaming

    @cached_property
    def fingerprint(self) -> str:
        """Identity for cache keys."""
        return source_fingerprint(self.path, self.revision)

    def stories_id(self, split: str) -> str:
        """A short hash of the texts of a split."""
        texts, _ = self.texts(split)
        values = "\0".join(str(value) for column in texts.column_names for value in texts[column])
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    def layout_note(self, split: str) -> str:
        """Notes for the user on how a split's files were read, or nothing."""
        return layout_note((local_files(self.path) or {}).get(split, []))

    def texts(self, split: str) -> tuple["Texts", str]:
        """The texts of a split, and a note for the user on where they come from."""
        texts = self._streamed(split) if self.streaming else self._loaded(split)
        if split == "test":
            if texts is None:
                return self.texts("validation")[0], "the source has no test split: validation is used instead"
            return texts, ""
        if split == "validation" and texts is not None:
            return texts, ""
        if self.streaming:
            raise InputError(f"data.path {self.path!r} has no validation split, which data.streaming needs: add one")
        if split == "train" and self._loaded("validation") is not None:
            return texts, ""
        # Independent of the run's seed: else a model could be validated on what an earlier run trained it on.
        whole = self._loaded("train")
        if len(whole) < 2:
            kept, held = _divided(whole[0].get("text") or "")
            if len(kept) < 100:
                raise InputError(f"data.path {self.path!r} has one short story and no validation split: expected more")
            part = [kept] if split == "train" else [held]
            texts = datasets_library().Dataset.from_dict({"text": part})
            note = f"{self.path} has no validation split: the last tenth of its one text is held out"
            return texts, "" if split == "train" else note
        order = np.random.default_rng(0).permutation(len(whole))
        held, kept = np.split(order, [max(1, min(len(whole) // 10, max(100, len(whole) // 100)))])
        if split == "train":
            return whole.select(np.sort(kept)), ""
        few = "" if len(held) > 20 else ", too few for a reliable loss; give validation.* or more stories"
        note = f"{self.path} has no validation split: {len(held):,} of its {len(whole):,} texts held out{few}"
        return whole.select(np.sort(held)), note

    def _loaded(self, split: str) -> "Texts | None":
        return load_texts(self.path, split, story_columns, demo_stories, self.revision)

    def _streamed(self, split: str) -> "Texts | None":
        """A split that is small enough for memory, without downloading the others."""
        stream = stream_texts(self.path, split, story_columns, demo_stories, self.revision)
        if stream is None:
            return None
        datasets = datasets_library()
        parts = blocks(stream, CHUNK, self.path, story_columns)
        return datasets.concatenate_datasets([datasets.Dataset.from_dict(rows) for rows, _ in parts])

    def train_tokenizer(self, vocab_size: int, folder: Path) -> None:
        """Train a tokenizer on the training stories, and save it."""
        if self.streaming:
            stream, total = stream_texts(self.path, "train", story_columns, demo_stories, self.revision), None
            chunks = (rows for rows, _ in blocks(stream, CHUNK, self.path, story_columns))
            chunks = islice(chunks, TRAINING_STORIES // CHUNK)
        else:
            texts, _ = self.texts("train")
            texts = texts.select(range(0, len(texts), -(-len(texts) // TRAINING_STORIES)))
            total = len(texts)
            chunks = (texts[begin : begin + CHUNK] for begin in range(0, total, CHUNK))
        with progress("training the tokenizer", total) as advance:
            train_tokenizer(_texts_of(chunks, f"data.path {self.path!r}", advance), vocab_size).save(folder)


def write_corpus(texts: "Texts", tokenizer: StoryTokenizer, folder: Path, name: str, notes: Sequence[str] = ()) -> None:
    """Tokenizes stories with `encode_stories` into a folder that `Corpus` reads, in bounded memory.

    Raises:
        InputError: all stories are empty, or `encode_stories` rejects them.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    lengths, empty = [np.zeros(1, dtype=np.int64)], 0
    with (
        open(folder / "tokens.bin", "wb") as tokens_file,
        open(folder / "learned.bin", "wb") as learned_file,
        progress(f"tokenizing {name}", len(texts)) as advance,
    ):
        for begin in range(0, len(texts), CHUNK):
            read = min(CHUNK, len(texts) - begin)
            stories, learned = encode_stories(texts[begin : begin + read], tokenizer, name)
            sizes = np.fromiter(map(len, stories), np.int64, len(stories))
            np.fromiter(chain.from_iterable(stories), dtype, sizes.sum()).tofile(tokens_file)
            if learned is not None:
                np.fromiter(chain.from_iterable(learned), np.bool_, sizes.sum()).tofile(learned_file)
            lengths.append(sizes)
            empty += read - len(stories)
            advance(read)
    offsets = np.cumsum(np.concatenate(lengths))
    if len(offsets) == 1:
        raise InputError(f"all stories of {name} are empty: expected at least one with text")
    notes = list(notes)
    if empty:
        notes.append(f"{name}: {empty:,} empty {'story' if empty == 1 else 'stories'} left out")
    np.save(folder / "offsets.npy", offsets)
    (folder / "about.json").write_text(json.dumps({"dtype": dtype.name, "notes": notes}), encoding="utf-8")


def _texts_of(chunks: Iterable[Rows], where: str, advance: Callable[[int], None]) -> Iterator[str]:
    """The non-empty texts; ``advance`` is called with the number of rows read."""
    for rows in chunks:
        yield from plain_texts(rows, where)
        advance(len(next(iter(rows.values()))))


def _divided(text: str) -> tuple[str, str]:
    """The text split into its beginning and its last tenth, at the end of a line or word."""
    last = len(text) - len(text) // 10
    border = next((found for mark in "\n " if (found := text.rfind(mark, len(text) // 2, last)) > 0), last)
    return text[:border], text[border:]
