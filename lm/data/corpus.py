"""A split of stories as token ids in a memory-mapped file, and the windows that batches are gathered from.

The file contains ``bos story eos bos story eos ...``; next to it are the offsets of its stories and, if not all
tokens are trained on, a mask. A sample is a window of that file, and a batch is gathered in one numpy indexing
operation, so that the model never waits for the loader.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from experiment.errors import InputError
from experiment.sources.batches import rounded_width

if TYPE_CHECKING:
    from lm.data.tokenizer import StoryTokenizer


class Corpus:
    """The token ids of a split, memory-mapped; story i is ``tokens[offsets[i] : offsets[i + 1]]``, from bos, if the
    tokenizer adds it, to eos."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.offsets: np.ndarray = np.load(folder / "offsets.npy")  # (stories + 1,) int64

    @cached_property
    def tokens(self) -> np.memmap:
        return np.memmap(self.folder / "tokens.bin", dtype=self.about["dtype"], mode="r")

    @cached_property
    def learned(self) -> np.memmap | None:
        """Whether each token is trained on; None if all are."""
        file = self.folder / "learned.bin"
        return np.memmap(file, dtype=np.bool_, mode="r") if file.stat().st_size else None

    def __getstate__(self) -> dict[str, Any]:  # so that spawned workers map the files instead of copying them
        return {name: value for name, value in self.__dict__.items() if name not in ("tokens", "learned")}

    def num_targets(self, windows: "Windows") -> np.ndarray:
        """(n,) int64, number of trained targets in each window."""
        if self.learned is None:
            return windows.length - 1
        before = np.concatenate(([0], np.cumsum(self.learned, dtype=np.int64)))
        return before[windows.start + windows.length] - before[windows.start + 1]

    def with_targets(self, windows: "Windows") -> "Windows":
        """The windows with at least one trained target.

        Raises:
            InputError: there is none.
        """
        kept = self.num_targets(windows) > 0
        if not kept.any():
            raise InputError(
                f"no completion begins within the first {int(windows.length.max()) - 1} tokens of its story: raise "
                "data.sequence_length, or shorten the prompts"
            )
        return Windows(*(column[kept] for column in windows))


class Windows(NamedTuple):
    """Samples as slices of the token file. Window i has ``length[i] - 1`` inputs, and as many targets, one later."""

    start: np.ndarray  # (n,) int64, position in the token file
    length: np.ndarray  # (n,) int64, tokens, at most sequence_length + 1
    skip: np.ndarray  # (n,) int64, first targets to skip, since an earlier window counts them


def first_windows(offsets: np.ndarray, sequence_length: int) -> Windows:
    """One window per story: its first ``sequence_length + 1`` tokens, bos included."""
    length = np.minimum(np.diff(offsets), sequence_length + 1)
    return Windows(offsets[:-1], length, np.zeros_like(length))


def packed_windows(total: int, sequence_length: int) -> Windows:
    """The whole file in blocks: each token except the first is the target of exactly one window."""
    start = np.arange(0, total - 1, sequence_length)
    return Windows(start, np.minimum(total - start, sequence_length + 1), np.zeros_like(start))


def sliding_windows(offsets: np.ndarray, sequence_length: int) -> Windows:
    """Every target of every story exactly once. For stories longer than a window, it slides by half
    a window, so that later targets have at least half a window of context."""
    stride = sequence_length // 2
    targets = np.diff(offsets) - 1
    count = 1 + np.maximum(0, -(-(targets - sequence_length) // stride))
    story = np.repeat(np.arange(len(count)), count)
    order = np.arange(len(story)) - np.repeat(np.cumsum(count) - count, count)  # 0, 1, ... within each story
    start = offsets[story] + order * stride
    length = np.minimum(offsets[story + 1] - start, sequence_length + 1)
    return Windows(start, length, np.where(order > 0, sequence_length - stride, 0))


def join_windows(*kinds: Windows) -> Windows:
    """Concatenate several kinds of windows."""
    return Windows(*map(np.concatenate, zip(*kinds, strict=True)))


def positions_in(starts: np.ndarray) -> np.ndarray:
    """Positions (B, T) that restart at 0 in each row and wherever ``starts`` (B, T) marks a story."""
    column = np.arange(starts.shape[1])
    return column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)


class WindowBatches(Dataset):
    """``self[indices]`` is the batch of these windows, padded on the right; padding is identified by position.

    Args:
        corpus: the tokens.
        windows: the samples.
        tokenizer: for the id of pads and the bytes of tokens.
        width: inputs per row; None for the batch's longest row, rounded up to one of a few widths.
        with_bytes: add text_mask and bytes, needed for bits per byte.
        with_positions: add positions, which keep stories of one row apart.
    """

    def __init__(
        self,
        corpus: Corpus,
        windows: Windows,
        tokenizer: "StoryTokenizer",
        width: int | None,
        with_bytes: bool = False,
        with_positions: bool = False,
    ) -> None:
        self.corpus, self.windows, self.width = corpus, windows, width
        self.with_bytes, self.with_positions = with_bytes, with_positions
        self.longest = int(windows.length.max()) - 1
        self.pad_id = tokenizer.pad_id
        self.bytes_per_token, self.prefix_bytes = tokenizer.bytes_per_token, tokenizer.prefix_bytes

    def __len__(self) -> int:
        return len(self.windows.start)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """tokens (B, T + 1) int32, T inputs and T targets, one later; loss_mask (B, T) bool, whether a target counts.
        With bytes also text_mask (B, T) bool, which leaves out eos too, and bytes (B, T) int32 of each target in it;
        with positions those of the inputs (B, T) int32, from 0 in each story or part of a story. No indices
        give one row in which nothing counts."""
        empty = len(indices) == 0
        indices = np.asarray([0] if empty else indices, dtype=np.int64)
        start, length = self.windows.start[indices, None], self.windows.length[indices, None]
        width = rounded_width(int(length.max()) - 1, self.longest) if self.width is None else self.width
        column = np.arange(width + 1)
        place = start + np.minimum(column, length - 1)  # (B, T + 1), in the file
        tokens = self.corpus.tokens[place].astype(np.int32)
        tokens[column >= length] = self.pad_id
        counted = (column[1:] < length) & (column[:-1] >= self.windows.skip[indices, None]) & (not empty)
        if self.corpus.learned is not None:
            counted &= self.corpus.learned[place[:, 1:]]
        batch = {"tokens": tokens, "loss_mask": counted}
        if self.with_bytes:
            sizes = self.bytes_per_token[tokens]  # excludes bos, eos and other special tokens
            text = counted & (sizes[:, 1:] > 0)
            sizes = sizes[:, 1:] - self.prefix_bytes * (sizes[:, :-1] == 0)  # a text starts after one of these
            batch |= {"text_mask": text, "bytes": (sizes * text).astype(np.int32)}
        if self.with_positions:
            inputs = place[:, :-1]
            starts = self.corpus.offsets[np.searchsorted(self.corpus.offsets, inputs)] == inputs
            batch["positions"] = positions_in(starts).astype(np.int32)
        return {name: torch.from_numpy(array) for name, array in batch.items()}
