"""IMDB reviews, or any texts with labels, as batches: drawn, balanced, disjoint, tokenized once.

A source's reviews are read, deduplicated within and across splits, and drawn with a seed; a split that the
source lacks is drawn from its training reviews. The drawn reviews are tokenized once and cached without truncation, so
that length and padding can change without tokenizing again.

With `padding: longest`, batches hold reviews of similar length: an epoch's shuffled reviews are sorted by length within
pools of 50 batches and cut into batches, which are shuffled again. On IMDB at 256 tokens this saves a fifth of the
work, but little at 128, since most reviews are longer. Widths are rounded up, so that few different ones occur.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from classify import reviews
from classify.pretrained import load_tokenizer
from classify.splits import SPLITS, Reviews, draw_splits, read_texts
from experiment.errors import InputError
from experiment.progress import progress
from experiment.sources.batches import EpochBatchSampler, ResumableDataModule, rounded_width
from experiment.sources.files import source_fingerprint
from experiment.sources.paths import cached_folder

POOL = 50  # batches per pool that is sorted by length
Padding = Literal["longest", "max_length"]
Truncation = Literal["head", "tail", "both"]


class TokenizedReviews(Dataset):
    """Token ids of reviews, without special tokens; indexed by a list of positions, it gives a whole batch.

    Args:
        tokens: the reviews' token ids, one after the other.
        offsets: (N + 1,) start of each review in `tokens`.
        labels: (N,) class ids, -1 where unknown.
        special: ids of the tokens at the beginning, at the end, and for padding ([CLS], [SEP], [PAD]).
        max_length: maximum length of a sequence, special tokens included.
        padding: to the longest sequence of the batch, or always to `max_length`.
        truncation: which part of a longer review is kept.
    """

    def __init__(
        self, tokens: np.ndarray, offsets: np.ndarray, labels: np.ndarray, special: tuple[int, int, int],
        max_length: int, padding: Padding, truncation: Truncation,
    ) -> None:  # fmt: skip
        self.tokens, self.offsets, self.labels = tokens, offsets, labels
        self.begin, self.end, self.pad = special
        self.max_length, self.padding, self.truncation = max_length, padding, truncation
        self.lengths = np.minimum(np.diff(offsets) + 2, max_length)  # (N,) with special tokens

    def __len__(self) -> int:
        return len(self.labels)

    def sequence(self, index: int) -> np.ndarray:
        """Token ids of one review as the model sees it, at most `max_length`."""
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        room = self.max_length - 2
        if len(tokens) > room:
            first = {"head": room, "tail": 0, "both": (room + 1) // 2}[self.truncation]
            tokens = np.concatenate([tokens[:first], tokens[len(tokens) - (room - first) :]])
        return np.concatenate([[self.begin], tokens, [self.end]])

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch: input_ids (B, T) int32, labels and index (B,) int64; lengths (B,) int32 if a row is padded. No
        indices give one row that does not count, whose label and index are -1."""
        empty = len(indices) == 0
        indices = np.asarray([0] if empty else indices)
        lengths = self.lengths[indices]
        longest = self.max_length if self.padding == "max_length" else int(lengths.max())
        width = rounded_width(longest, self.max_length)
        input_ids = np.full((len(indices), width), self.pad, dtype=np.int32)
        for row, index, length in zip(input_ids, indices, lengths, strict=True):
            row[:length] = self.sequence(index)
        labels = self.labels[indices]
        if empty:
            labels = indices = np.array([-1])
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "index": torch.from_numpy(indices.astype(np.int64)),
        }
        if lengths.min() < width:  # computed here, to avoid a device synchronization
            batch["lengths"] = torch.from_numpy(lengths.astype(np.int32))
        return batch


class TextClassificationDataModule(ResumableDataModule):
    """Reviews with labels for training and evaluation, texts for prediction."""

    def __init__(
        self,
        path: str = "stanfordnlp/imdb",
        tokenizer: str | None = None,
        train_size: int | None = 5000,
        validation_size: int | None = 1000,
        test_size: int | None = 1000,
        max_length: int = 256,
        eval_max_length: int | None = None,
        padding: Padding = "longest",
        truncation: Truncation = "head",
        batch_size: int = 16,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        label_names: list[str] | None = None,
        texts: list[str] | str | None = None,
        seed: int = 42,
        order_seed: int | None = None,
        revision: str | None = None,
        num_workers: int | None = None,
    ) -> None:
        """
        Args:
            path: A hub name, a local folder or file with the columns text and label, or demo (synthetic reviews).
            tokenizer: A hub name or local folder; by default that of the model.
            train_size: Reviews to draw for training, balanced over the classes; null takes all.
            validation_size: Reviews to draw for validation; null takes all of a split the source has.
            test_size: Reviews to draw for testing; null takes all of a split the source has.
            max_length: Maximum tokens per review, including the two special ones.
            eval_max_length: Maximum tokens per review outside training, where more cost little; null: max_length.
            padding: Pad to the longest review of the batch (batches are grouped by length), or to max_length.
            truncation: The part of a longer review that is kept: its head, its tail, or both ends.
            batch_size: Reviews per training step and process.
            global_batch_size: Reviews per optimizer step: batch_size x processes x micro-batches. It
                sets trainer.accumulate_grad_batches, so any number of processes takes the same steps.
            eval_batch_size: Reviews per batch outside training; results are equal. By default 64 on a GPU, 16 on a
                CPU, where larger batches take more memory but no less time.
            label_names: Names of the classes, by id; by default the source's, or negative and positive.
            texts: What predict classifies: a list of texts or a file; by default the test reviews.
            seed: Seed of the split: which reviews are drawn for which split.
            order_seed: Seed of the order of training batches; by default seed_everything's, else `seed`.
            revision: Branch, tag or commit of a data set of the hub; by default the newest.
            num_workers: Processes that prepare batches; 0 prepares them in the training process. By default 2 where a
                GPU is used, else 0.
        """
        super().__init__()
        self.path, self.tokenizer_name, self.texts, self.seed = path, tokenizer, texts, seed
        self.revision = revision
        self.order_seed = seed if order_seed is None else order_seed
        self.sizes = dict(zip(SPLITS, (train_size, validation_size, test_size), strict=True))
        self.max_length, self.padding, self.truncation = max_length, padding, truncation
        self.eval_max_length = max_length if eval_max_length is None else eval_max_length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.step_parts, self.global_batch = {"reviews": batch_size}, ("global_batch_size", global_batch_size)
        self.given_label_names, self.num_workers = label_names, num_workers
        numbers = (
            ("max_length", max_length, 3), ("eval_max_length", self.eval_max_length, 3),
            ("batch_size", batch_size, 1), ("eval_batch_size", 1 if eval_batch_size is None else eval_batch_size, 1),
            ("num_workers", num_workers or 0, 0),
            *((f"{split}_size", size, 2) for split, size in self.sizes.items() if size is not None),
        )  # fmt: skip
        below = [f"data.{name} {value}: expected at least {least}" for name, value, least in numbers if value < least]
        if below:
            raise InputError("; ".join(below))
        if label_names is not None and (len(label_names) < 2 or len(set(label_names)) < len(label_names)):
            raise InputError(f"data.label_names is {label_names}: expected at least two different names")

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, in the order of their ids."""
        return self.given_label_names or json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_name or "bert-base-uncased")

    @cached_property
    def folder(self) -> Path:
        """The cached folder with the drawn reviews and their tokens; created if missing."""
        backend = self.tokenizer.backend_tokenizer.to_str()
        source = source_fingerprint(self.path, self.revision)
        if self.path == "demo":
            source += hashlib.sha256(Path(reviews.__file__).read_bytes() + reviews.DATA.read_bytes()).hexdigest()
        key = {
            "format": 2,
            "source": source,
            "sizes": self.sizes,
            "seed": self.seed,
            "label_names": self.given_label_names,
            "tokenizer": hashlib.sha256(backend.encode()).hexdigest(),
        }
        return cached_folder("reviews", key, self._build)

    def prepare_data(self) -> None:
        if self._predicts_texts:
            return
        _ = self.folder

    def reviews(self, split: str) -> Reviews:
        """The drawn reviews of train, validation or test, as texts."""
        texts = json.loads((self.folder / f"{split}.json").read_text(encoding="utf-8"))
        return Reviews(texts, np.load(self.folder / f"{split}_labels.npy"))

    @cached_property
    def predict_reviews(self) -> Reviews:
        """The texts that predict classifies."""
        if self.texts is None:
            return self.reviews("test")
        texts = read_texts(self.texts)
        return Reviews(texts, np.full(len(texts), -1))

    def dataset(self, split: str) -> TokenizedReviews:
        """The tokenized reviews of train, validation, test or predict."""
        if split == "predict" and self._predicts_texts:
            tokens, offsets = self._tokenize(self.predict_reviews.texts)
            labels = self.predict_reviews.labels
        else:
            stem = "test" if split == "predict" else split
            tokens, offsets, labels = (
                np.load(self.folder / f"{stem}_{part}.npy") for part in ("tokens", "offsets", "labels")
            )
        special = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id)
        max_length = self.max_length if split == "train" else self.eval_max_length
        return TokenizedReviews(tokens, offsets, labels, special, max_length, self.padding, self.truncation)

    def train_dataloader(self) -> DataLoader:
        dataset = self.dataset("train")
        world = self.trainer.world_size if self.trainer else 1
        if world * self.batch_size > len(dataset):
            most, processes = len(dataset) // world, "1 process" if world == 1 else f"{world} processes"
            cure = f"give --data.batch_size {most} or less" if most else "use fewer processes"
            raise InputError(
                f"data.batch_size {self.batch_size} on {processes} is more than the {len(dataset)} training reviews: "
                f"{cure}, or more reviews"
            )

        def epoch_batches(epoch: int) -> list[list[int]]:
            lengths = dataset.lengths if self.padding == "longest" else None
            return training_plan(len(dataset), self.batch_size, world, lengths, (self.order_seed, epoch))

        return self._loader(dataset, self.resumable(EpochBatchSampler(epoch_batches)))

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader:
        if (self.dataset("test").labels < 0).any():
            raise InputError(
                f"the test split of data.path {self.path} has no labels to test against: use validate, or predict for "
                "the model's predictions"
            )
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation("predict")

    @property
    def _predicts_texts(self) -> bool:
        predicting = self.trainer is not None and self.trainer.state.fn == "predict"
        return predicting and self.texts is not None

    def _evaluation(self, split: str) -> DataLoader:
        dataset = self.dataset(split)
        # Longest first, so that an out-of-memory error comes at once. The prediction writer restores the order.
        order = np.argsort(-dataset.lengths, kind="stable")
        size = self.eval_batch_size or (64 if self.on_gpu else 16)
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        return self._loader(dataset, EpochBatchSampler(lambda epoch: batches))

    def _loader(self, dataset: TokenizedReviews, sampler: EpochBatchSampler) -> DataLoader:
        workers = (2 if self.on_gpu else 0) if self.num_workers is None else self.num_workers
        return self.device_loader(dataset, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

    def _tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All tokens one after the other, and the (N + 1,) offsets; "[SEP]" in a review is text, not a token."""
        sequences: list[np.ndarray] = []  # not lists, whose integers take nine times the memory
        with progress("tokenizing", len(texts)) as advance:
            for start in range(0, len(texts), 256):
                chunk = list(texts[start : start + 256])
                encoded = self.tokenizer(
                    chunk, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                    return_token_type_ids=False, verbose=False,
                )  # fmt: skip
                sequences += [np.array(sequence, dtype=np.int32) for sequence in encoded["input_ids"]]
                advance(len(chunk))
        offsets = np.cumsum([0, *map(len, sequences)])
        return np.concatenate([*sequences, np.empty(0, dtype=np.int32)]), offsets

    def describe_step(self, processes: int, accumulated: int) -> str:
        train, validation = (len(self.dataset(split)) for split in ("train", "validation"))
        found = f"{train:,} reviews to train on, {validation:,} to validate on; classes: {', '.join(self.label_names)}"
        return f"{found}\n{super().describe_step(processes, accumulated)}"

    def _build(self, folder: Path) -> None:
        names, drawn = draw_splits(self.path, self.sizes, self.given_label_names, self.seed, self.revision)
        (folder / "labels.json").write_text(json.dumps(names), encoding="utf-8")
        for split, chosen in drawn.items():
            tokens, offsets = self._tokenize(chosen.texts)
            with (folder / f"{split}.json").open("w", encoding="utf-8") as stream:
                json.dump(chosen.texts, stream)
            for part, array in (("tokens", tokens), ("offsets", offsets), ("labels", chosen.labels)):
                np.save(folder / f"{split}_{part}.npy", array)


def training_plan(
    count: int, batch_size: int, world: int, lengths: np.ndarray | None, seed: tuple[int, int]
) -> list[list[int]]:
    """One epoch's batches, each review at most once; a remainder too small for a step of all processes is left out.

    With `lengths` (N,), each batch holds reviews of similar length; our own, since transformers' LengthGroupedSampler
    keeps the batches of a pool in the order of their length. The `world` batches of one step hold together what one
    process would take with a batch of `world * batch_size`.
    """
    rng = np.random.default_rng(seed)
    step = world * batch_size
    order = rng.permutation(count)[: count // step * step]
    if lengths is not None:
        pools = [order[i : i + POOL * step] for i in range(0, len(order), POOL * step)]
        order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    steps = [order[i : i + step] for i in range(0, len(order), step)]
    if lengths is not None:
        steps = [steps[i] for i in rng.permutation(len(steps))]
    return [taken[rank::world].tolist() for taken in steps for rank in range(world)]
