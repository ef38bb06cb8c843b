"""TinyStories, or any other stories, as batches of token ids.

Each split is tokenised once, on all cores, into the memory-mapped file of a `Corpus`, which is cached; or it is read
while training, by a `StoryStream`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from experiment.errors import InputError
from experiment.progress import console, progress
from experiment.sources.batches import EpochBatchSampler, ResumableDataModule, rank_and_processes
from experiment.sources.cache import cached_folder
from experiment.sources.files import datasets_library, load_texts, local_files, source_fingerprint
from experiment.sources.rows import layout_note
from experiment.sources.streams import blocks, stream_texts
from lm.data.completions import Rows, plain_texts, story_columns
from lm.data.corpus import (
    CHUNK,
    Corpus,
    WindowBatches,
    first_windows,
    join_windows,
    packed_windows,
    sliding_windows,
    write_corpus,
)
from lm.data.demo_stories import demo_stories
from lm.data.prompts import PromptBatches, read_prompts
from lm.data.streaming import StoryStream, StreamProgress
from lm.data.tokenizer import StoryTokenizer, train_tokenizer
from lm.data.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Texts

Evaluation = Literal["full", "first_window"]
FORMAT = 3  # of the cached folders; raise it when what is written, or what decides it, changes
TRAINING_STORIES = 200_000  # that a tokenizer is trained on, at most
HELD_OUT = 100  # one story in so many becomes validation where the source has none


class TextDataModule(ResumableDataModule):
    """The stories, and how they become sequences of tokens.

    Args:
        path: Where the stories are: a hub name, a local folder with train.* and validation.* files (parquet, JSON
            lines, CSV, text), a local file, or ``demo`` for the embedded synthetic corpus. A column ``text`` is trained
            on whole; of ``prompt`` and ``completion`` the completion, of ``messages`` what the assistant says.
        tokenizer: A hub name, a local folder or file (tokenizer.json, SentencePiece .model, llama2.c .bin), or
            ``train`` for one that is trained on the stories.
        vocab_size: Size of a tokenizer that is trained; one that is loaded has its own.
        sequence_length: Tokens that the model sees at once.
        packing: Join the training stories into full sequences, so that no token is lost. Otherwise each story is
            a sequence of its own, cut off or padded.
        document_mask: With packing, keep the stories of a sequence apart: none sees its neighbours, and the positions
            begin with 0 in each.
        extra_first_windows: With packing, also train each story's first sequence_length tokens as a sequence of its
            own: an epoch is the whole text, then once more what ``first_window`` evaluates; the second epoch begins
            with the latter.
        batch_size: Training sequences a step and process.
        global_batch_tokens: Tokens that an optimizer step trains, pads included: sequences x length x processes x
            micro-batches. From it follows trainer.accumulate_grad_batches, so that any number of processes makes the
            same steps.
        eval_batch_size: Sequences a step and process of validation, test and prediction; results do not depend on it.
        evaluation: ``full``, every token of every story predicted exactly once, or ``first_window``, only the first
            sequence_length tokens of each story.
        prompts: Beginnings of stories for ``predict``: a list, or a text file with one a line, or a JSON or JSON
            lines file of strings or of objects with a ``prompt``.
        seed: Of the order of the training sequences.
        num_workers: Processes that prepare batches; 0 prepares them in the training process. By default 2 where a GPU
            is used, whose work the training process then only launches, else 0.
        streaming: Read the training stories while training, from the hub or from files, rather than tokenise them all
            first; for corpora larger than the disk. They are shuffled within blocks only, and max_steps ends the run.
        revision: Branch, tag or commit of a data set of the hub; by default the newest.
        second_path: Where other texts are, as ``path``, on which the model is validated beside, as ``val/second_loss``
            and so on: what an adapted model has forgotten.

    Raises:
        InputError: A value that is out of range.
    """

    def __init__(
        self,
        path: str = "roneneldan/TinyStories",
        tokenizer: str = "train",
        vocab_size: int = 32768,
        sequence_length: int = 128,
        packing: bool = False,
        document_mask: bool = False,
        extra_first_windows: bool = False,
        batch_size: int = 32,
        global_batch_tokens: int | None = None,
        eval_batch_size: int = 64,
        evaluation: Evaluation = "full",
        prompts: list[str] | str | None = None,
        seed: int = 1234,
        num_workers: int | None = None,
        streaming: bool = False,
        second_path: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        least = {"sequence_length": (sequence_length, 2), "num_workers": (num_workers or 0, 0)}
        least |= {"batch_size": (batch_size, 1), "eval_batch_size": (eval_batch_size, 1), "seed": (seed, 0)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise InputError(f"data.{name} {value}: expected at least {minimum}")
        if evaluation not in get_args(Evaluation):
            raise InputError(f"data.evaluation {evaluation!r}: expected {' or '.join(get_args(Evaluation))}")
        if extra_first_windows and (streaming or not packing):
            raise InputError(
                f"data.extra_first_windows true needs data.packing true and data.streaming false, not {packing} and "
                f"{streaming}: change them, or leave it out"
            )
        if document_mask and not packing:
            raise InputError(
                "data.document_mask true keeps the stories of packed sequences apart, but data.packing is false: set "
                "it to true, or leave out data.document_mask"
            )
        self.path = path
        self.tokenizer_name = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.packing = packing
        self.document_mask = document_mask
        self.extra_first_windows = extra_first_windows
        self.batch_size = batch_size
        self.step_parts = {"sequences": batch_size, "tokens": sequence_length}
        self.global_batch = "global_batch_tokens", global_batch_tokens
        self.eval_batch_size = eval_batch_size
        self.evaluation = evaluation
        self.prompts = prompts
        self.seed = seed
        self._num_workers = num_workers
        self.streaming = streaming
        self.second_path = second_path
        self.revision = revision
        self.stream_progress = StreamProgress()
        self._corpora: dict[str, Corpus] = {}

    @cached_property
    def tokenizer(self) -> StoryTokenizer:
        """Loaded, or trained and cached, when it is first asked for."""
        if self.tokenizer_name != "train":
            return load_tokenizer(self.tokenizer_name)
        key = {"source": self._source, "vocab_size": self.vocab_size, "format": FORMAT}
        if self.streaming:
            key["trained on"] = "the first stories"
        tokenizer = load_tokenizer(cached_folder("tokenizers", key, self._train_tokenizer))
        if tokenizer.vocab_size < self.vocab_size:
            note = f"data.vocab_size {self.vocab_size}: these stories yield {tokenizer.vocab_size}, which are taken"
            _tell(note)
        return tokenizer

    @property
    def _source(self) -> str:
        return source_fingerprint(self.path, self.revision)

    @property
    def num_workers(self) -> int:
        return (2 if self.on_gpu else 0) if self._num_workers is None else self._num_workers

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, which the model's embedding must have."""
        return self.tokenizer.vocab_size

    @property
    def facts(self) -> dict[str, Any]:
        """What comparisons ask for: tokens (targets, padding excluded) and batches of an epoch, unless streamed; what
        validation reads, equal for runs whose bits per byte compare; and the tokenizer, for those whose losses do."""
        texts, _ = self._texts("validation")
        values = "\0".join(str(value) for column in texts.column_names for value in texts[column])
        stories = hashlib.sha256(values.encode()).hexdigest()[:12]
        tokenizer = self.tokenizer.fingerprint[:12]
        first = f"the first {self.sequence_length} tokens of tokenizer {tokenizer} of each story"
        read = "every token of every story" if self.evaluation == "full" else first
        facts = {"evaluated": f"{read} of {stories}", "tokenizer": tokenizer}
        if not self.streaming:
            windows = self.train_dataloader().dataset.windows
            facts |= {"tokens_per_epoch": int(self.corpus("train").num_targets(windows).sum())}
            facts |= {"batches_per_epoch": len(self.train_sampler.epoch_batches(0))}
        return facts

    def _train_tokenizer(self, folder: Path) -> None:
        if self.streaming:
            stream, total = stream_texts(self.path, "train", story_columns, demo_stories, self.revision), None
            chunks = (rows for rows, _ in blocks(stream, CHUNK, self.path, story_columns))
            chunks = islice(chunks, TRAINING_STORIES // CHUNK)
        else:
            texts, _ = self._texts("train")
            texts = texts.select(range(0, len(texts), -(-len(texts) // TRAINING_STORIES)))
            total = len(texts)
            chunks = (texts[begin : begin + CHUNK] for begin in range(0, total, CHUNK))
        with progress("training the tokenizer", total) as advance:
            train_tokenizer(_stories_in(chunks, f"data.path {self.path!r}", advance), self.vocab_size).save(folder)

    def _texts(self, split: str) -> tuple["Texts", str]:
        """The texts of a split, and what the user should know about where they are from."""
        texts = self._streamed(split) if self.streaming else self._loaded(split)
        if split == "test":
            if texts is None:
                return self._texts("validation")[0], "the source has no test split: validation is used for test"
            return texts, ""
        if split == "validation" and texts is not None:
            return texts, ""
        if self.streaming:
            raise InputError(f"data.path {self.path!r} has no validation split, which data.streaming needs: add one")
        if split == "train" and self._loaded("validation") is not None:
            return texts, ""
        # Which stories are held out must not depend on the run's seed: a model would be validated on what it
        # was trained on in an earlier run.
        whole = self._loaded("train")
        if len(whole) < 2:
            kept, held = _divided(whole[0].get("text") or "")
            if len(kept) < 100:
                raise InputError(f"data.path {self.path!r} has one short story and no validation split: expected more")
            part = [kept] if split == "train" else [held]
            texts = datasets_library().Dataset.from_dict({"text": part})
            return texts, "no validation split: the last tenth of the one text is held out"
        order = np.random.default_rng(0).permutation(len(whole))
        held, kept = np.split(order, [max(1, len(whole) // HELD_OUT)])
        if split == "train":
            return whole.select(np.sort(kept)), ""
        return whole.select(np.sort(held)), f"no validation split: {len(held):,} of the training stories held out"

    def _loaded(self, split: str) -> "Texts | None":
        return load_texts(self.path, split, story_columns, demo_stories, self.revision)

    def _streamed(self, split: str) -> "Texts | None":
        """A split that is small enough for memory, without fetching the others."""
        stream = stream_texts(self.path, split, story_columns, demo_stories, self.revision)
        if stream is None:
            return None
        datasets = datasets_library()
        parts = blocks(stream, CHUNK, self.path, story_columns)
        return datasets.concatenate_datasets([datasets.Dataset.from_dict(rows) for rows, _ in parts])

    def corpus(self, split: str) -> Corpus:
        """The tokenised split (train, validation or test), from the cache, or made and cached now."""
        if split not in self._corpora:

            def build(folder: Path) -> None:
                texts, note = self._texts(split)
                files = (local_files(self.path) or {}).get(split, [])
                notes = [text for text in (note, layout_note(files)) if text]
                write_corpus(texts, self.tokenizer, folder, f"{self.path} ({split})", notes)

            tokenizer = self.tokenizer
            key = {"source": self._source, "tokenizer": tokenizer.fingerprint, "split": split, "format": FORMAT}
            key |= {"begins_with": tokenizer.begins_with, "chat_template": tokenizer.chat_template}
            folder = cached_folder("tokens", key, build)
            self._corpora[split] = Corpus(folder)
            for note in self._corpora[split].about["notes"]:
                _tell(note)
        return self._corpora[split]

    def setup(self, stage: str) -> None:
        splits = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for split in splits.get(stage, ()):
            if self.streaming and split == "train":
                if note := layout_note((local_files(self.path) or {}).get(split, [])):
                    _tell(note)
            else:
                self.corpus(split)
        if stage in ("fit", "validate") and self._second is not None:
            self._second.corpus("validation")
        if stage == "fit" and not self.streaming and not self.packing:
            corpus = self.corpus("train")
            windows = (first_windows(corpus.offsets, length) for length in (self.sequence_length, len(corpus.tokens)))
            kept, whole = (corpus.num_targets(of_length).sum() for of_length in windows)
            if kept < whole / 2:
                _tell(
                    f"note: only the first {self.sequence_length} tokens of each story are trained on, "
                    f"{kept / whole:.1%} of the text; --data.packing true takes all of it"
                )

    def train_dataloader(self) -> DataLoader:
        if self.streaming:
            return self._stream()
        corpus = self.corpus("train")
        kinds = [packed_windows(len(corpus.tokens), self.sequence_length)] if self.packing else []
        if self.extra_first_windows or not self.packing:
            kinds.append(corpus.with_targets(first_windows(corpus.offsets, self.sequence_length)))
        windows = join_windows(*kinds)
        data = WindowBatches(corpus, windows, self.tokenizer, self.sequence_length, with_positions=self.document_mask)

        @lru_cache(maxsize=1)  # it is asked for its length many times
        def shuffled(epoch: int) -> list[np.ndarray]:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(data))
            if self.extra_first_windows:  # in turns, so that a little more than one epoch still ends on first windows
                order = order[np.argsort((order >= len(kinds[0].start)) ^ (epoch % 2 == 1), kind="stable")]
            return _in_batches(order, self.batch_size)

        return self._loader(data, self.resumable(EpochBatchSampler(shuffled)))

    def _stream(self) -> DataLoader:
        stream = StoryStream(
            self.path,
            self.tokenizer,
            self.sequence_length,
            self.batch_size,
            self.packing,
            self.seed,
            *rank_and_processes(),
            self.stream_progress,
            self.revision,
            self.document_mask,
        )
        return self.device_loader(stream, num_workers=self.num_workers, collate_fn=_as_it_is)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.stream_progress.begin(batch) if "position" in batch else batch

    def state_dict(self) -> dict[str, Any]:
        if not self.streaming:
            return super().state_dict()
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current
        state = self.stream_progress.state(processed=batches.processed == batches.ready)
        processes = [state]
        if self.trainer.world_size > 1:
            processes *= self.trainer.world_size
            torch.distributed.all_gather_object(processes, state)
        return {"processes": processes, "num_workers": self.num_workers, **self._cut()}

    def _cut(self) -> dict[str, Any]:
        """What decides how a stream is cut into batches."""
        return {name: getattr(self, name) for name in ("batch_size", "sequence_length", "packing")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.streaming:
            super().load_state_dict(state_dict)
            return
        if "processes" not in state_dict:
            raise InputError("this run has not streamed its data: resume it with --data.streaming false")
        found = len(state_dict["processes"]), state_dict["num_workers"]
        if found != (self.trainer.world_size, self.num_workers):
            raise InputError(
                f"this run has streamed with {found[0]} processes and data.num_workers {found[1]}: resume it with as "
                "many, since each has its own share of the stories"
            )
        for name, now in self._cut().items():
            if (before := state_dict.get(name, now)) != now:
                raise InputError(
                    f"data.{name} {now}: this run has streamed with {before}, on which its place depends; "
                    f"give --data.{name} {before}"
                )
        self.stream_progress.load(state_dict["processes"][self.trainer.global_rank])

    @cached_property
    def _second(self) -> "TextDataModule | None":
        if self.second_path is None:
            return None
        second = TextDataModule(
            self.second_path,
            sequence_length=self.sequence_length,
            eval_batch_size=self.eval_batch_size,
            evaluation=self.evaluation,
            num_workers=self.num_workers,
        )
        second.tokenizer = self.tokenizer
        return second

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        first = self._eval_loader("validation")
        return first if self._second is None else [first, self._second._eval_loader("validation")]

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        data = PromptBatches(read_prompts(self.prompts), self.tokenizer)
        batches = _in_batches(np.arange(len(data)), self.eval_batch_size)
        return self._loader(data, EpochBatchSampler(lambda epoch: batches))

    def _eval_loader(self, split: str) -> DataLoader:
        corpus = self.corpus(split)
        make = sliding_windows if self.evaluation == "full" else first_windows
        windows = corpus.with_targets(make(corpus.offsets, self.sequence_length))
        data = WindowBatches(corpus, windows, self.tokenizer, width=None, with_bytes=True)
        # Rows of like length together, so that little is padded; the longest first, so that memory fails at once.
        size = min(self.eval_batch_size, -(-len(data) // rank_and_processes()[1]))
        batches = _in_batches(np.argsort(-windows.length, kind="stable"), size)
        return self._loader(data, EpochBatchSampler(lambda epoch: batches))

    def _loader(self, data: Dataset, sampler: EpochBatchSampler) -> DataLoader:
        workers = self.num_workers
        return self.device_loader(data, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)


def _stories_in(chunks: Iterable[Rows], where: str, advance: Callable[[int], None]) -> Iterator[str]:
    """The texts that are not empty; ``advance`` learns how many rows were passed."""
    for rows in chunks:
        yield from plain_texts(rows, where)
        advance(len(next(iter(rows.values()))))


def _divided(text: str) -> tuple[str, str]:
    """The text and its last tenth, divided where a line ends, or a word."""
    last = len(text) - len(text) // 10
    border = next((found for mark in "\n " if (found := text.rfind(mark, len(text) // 2, last)) > 0), last)
    return text[:border], text[border:]


@rank_zero_only
def _tell(note: str) -> None:
    console.print(note)


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[begin : begin + size] for begin in range(0, len(order), size)]
