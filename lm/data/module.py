"""Stories as batches of token ids.

Each split is tokenized once, on all cores, into the cached, memory-mapped file of a `Corpus`; or it is read during
training by a `StoryStream`.
"""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from experiment.console import console
from experiment.errors import InputError
from experiment.sources.batches import EpochBatchSampler, ResumableDataModule, rank_and_processes
from experiment.sources.paths import cached_folder
from lm.data.corpus import Corpus, WindowBatches, first_windows, join_windows, packed_windows, sliding_windows

if TYPE_CHECKING:
    from lm.data.source import StorySource
    from lm.data.streaming import StreamProgress
    from lm.data.tokenizer import StoryTokenizer

Evaluation = Literal["full", "first_window"]
_note = rank_zero_only(console.print)
FORMAT = 4  # of cached folders; raise it when their contents change


class TextDataModule(ResumableDataModule):
    """The stories, and how they are turned into token sequences.

    Args:
        path: Source of the stories: a hub name, a local folder with train.* and validation.* files (parquet, JSON
            lines, CSV, text), a local file, or ``demo`` for the built-in synthetic corpus. A column ``text`` is trained
            on completely; with ``prompt`` and ``completion`` only the completion, with ``messages`` only the assistant.
        tokenizer: A hub name, a local folder or file (tokenizer.json, SentencePiece .model, llama2.c .bin), or
            ``train`` to train one on the stories.
        vocab_size: Size of a trained tokenizer; a loaded one has its own.
        sequence_length: Tokens of a training sequence.
        packing: Join the training stories into full sequences. Otherwise each story is a sequence, truncated or padded.
        document_mask: With packing, keep the stories of a sequence apart: none sees another, and positions
            start at 0 in each.
        extra_first_windows: With packing, also train each story's first sequence_length tokens as a sequence of its
            own: an epoch is the whole text, then again what ``first_window`` evaluates; the second epoch starts
            with the latter.
        batch_size: Training sequences per step and process.
        global_batch_tokens: Tokens of an optimizer step, padding included: sequences x length x processes x
            micro-batches. It sets trainer.accumulate_grad_batches: any number of processes takes the same steps.
        eval_batch_size: Sequences per step and process in validation, test and prediction; does not affect results.
        evaluation: ``full``, every token of every story predicted exactly once, or ``first_window``, only the first
            sequence_length tokens of each story.
        prompts: Beginnings of stories for ``predict``: a list, a text file with one per line, or a JSON or JSON lines
            file of strings or of objects with a ``prompt``.
        seed: Seed of the order of the training sequences.
        num_workers: Processes that prepare batches; 0 prepares them in the training process. By default 2 with a GPU,
            else 0.
        streaming: Read the training stories during training, from the hub or from files, instead of tokenizing them
            first; for corpora larger than the disk. They are only shuffled within blocks, and need trainer.max_steps.
        revision: Branch, tag or commit of a data set of the hub; by default the newest.
        second_path: Other texts, as ``path``, to also validate on (``val/second_loss`` …): shows what an adapted model
            forgets.

    Raises:
        InputError: A value is out of range.
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
        below = [f"data.{name} {value}: expected at least {low}" for name, (value, low) in least.items() if value < low]
        if below:
            raise InputError("; ".join(below))
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
        self.path, self.second_path, self.revision, self.streaming = path, second_path, revision, streaming
        self.tokenizer_name, self.vocab_size = tokenizer, vocab_size
        self.sequence_length, self.packing, self.document_mask = sequence_length, packing, document_mask
        self.extra_first_windows = extra_first_windows
        self.batch_size, self.eval_batch_size, self._num_workers = batch_size, eval_batch_size, num_workers
        self.step_parts = {"sequences": batch_size, "tokens": sequence_length}
        self.global_batch = "global_batch_tokens", global_batch_tokens
        self.evaluation, self.prompts, self.seed = evaluation, prompts, seed
        self._corpora: dict[str, Corpus] = {}

    @cached_property
    def source(self) -> "StorySource":
        """The source of the stories; prediction needs none."""
        from lm.data.source import StorySource

        return StorySource(self.path, self.revision, self.streaming)

    @cached_property
    def tokenizer(self) -> "StoryTokenizer":
        """The tokenizer: loaded, or trained and cached, at first use."""
        from lm.data.tokenizer_files import load_tokenizer

        if self.tokenizer_name != "train":
            return load_tokenizer(self.tokenizer_name)
        key = {"source": self.source.fingerprint, "vocab_size": self.vocab_size, "format": FORMAT}
        if self.streaming:
            key["trained on"] = "the first stories"
        folder = cached_folder("tokenizers", key, lambda folder: self.source.train_tokenizer(self.vocab_size, folder))
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size < self.vocab_size:
            _note(f"data.vocab_size {self.vocab_size}: these stories yield only {tokenizer.vocab_size}, which is used")
        return tokenizer

    @cached_property
    def stream_progress(self) -> "StreamProgress":
        """How far streamed training has come."""
        from lm.data.streaming import StreamProgress

        cut = ("num_workers", "batch_size", "sequence_length", "packing")
        return StreamProgress({name: getattr(self, name) for name in cut})

    @property
    def num_workers(self) -> int:
        return (2 if self.on_gpu else 0) if self._num_workers is None else self._num_workers

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, and of the model's embedding."""
        return self.tokenizer.vocab_size

    @property
    def facts(self) -> dict[str, Any]:
        """For comparisons."""
        from lm.data.facts import facts_of

        return facts_of(self)

    def corpus(self, split: str) -> Corpus:
        """The tokenized split (train, validation or test), cached."""
        if split not in self._corpora:

            def build(folder: Path) -> None:
                from lm.data.source import write_corpus

                texts, note = self.source.texts(split)
                notes = [text for text in (note, self.source.layout_note(split)) if text]
                write_corpus(texts, self.tokenizer, folder, f"{self.path} ({split})", notes)

            tokenizer = self.tokenizer
            key = {"source": self.source.fingerprint, "tokenizer": tokenizer.fingerprint, "split": split}
            key |= {"format": FORMAT, "begins_with": tokenizer.begins_with, "chat_template": tokenizer.chat_template}
            self._corpora[split] = Corpus(cached_folder("tokens", key, build))
            for note in self._corpora[split].about["notes"]:
                _note(note)
        return self._corpora[split]

    def setup(self, stage: str) -> None:
        splits = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for split in splits.get(stage, ()):
            if self.streaming and split == "train":
                if note := self.source.layout_note(split):
                    _note(note)
            else:
                self.corpus(split)
        if stage in ("fit", "validate") and self._second is not None:
            self._second.corpus("validation")
        if stage == "fit" and not self.streaming and not self.packing:
            corpus = self.corpus("train")
            windows = (first_windows(corpus.offsets, length) for length in (self.sequence_length, len(corpus.tokens)))
            kept, whole = (corpus.num_targets(of_length).sum() for of_length in windows)
            if kept < whole / 2:
                _note(
                    f"note: only the first {self.sequence_length} tokens of each story are trained on, "
                    f"{kept / whole:.1%} of the text; --data.packing true uses all of it"
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

        @lru_cache(maxsize=1)  # its length is used often
        def shuffled(epoch: int) -> list[np.ndarray]:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(data))
            if self.extra_first_windows:  # alternating, so that a bit more than one epoch ends on first windows
                order = order[np.argsort((order >= len(kinds[0].start)) ^ (epoch % 2 == 1), kind="stable")]
            return _in_batches(order, self.batch_size)

        return self._loader(data, self.resumable(EpochBatchSampler(shuffled)))

    def _stream(self) -> DataLoader:
        from lm.data.streaming import StoryStream, unchanged

        options = (self.sequence_length, self.batch_size, self.packing, self.seed, *rank_and_processes())
        own = {"progress": self.stream_progress, "revision": self.revision, "with_positions": self.document_mask}
        stream = StoryStream(self.path, self.tokenizer, *options, **own)
        return self.device_loader(stream, num_workers=self.num_workers, collate_fn=unchanged)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.stream_progress.begin(batch) if "position" in batch else batch

    def state_dict(self) -> dict[str, Any]:
        return self.stream_progress.state_of_processes(self.trainer) if self.streaming else super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.streaming:
            self.stream_progress.load_state_of_processes(state_dict, self.trainer)
        else:
            super().load_state_dict(state_dict)

    @cached_property
    def _second(self) -> "TextDataModule | None":
        if self.second_path is None:
            return None
        same = ("sequence_length", "eval_batch_size", "evaluation", "num_workers")
        second = TextDataModule(self.second_path, **{name: getattr(self, name) for name in same})
        second.tokenizer = self.tokenizer
        return second

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        first = self._eval_loader("validation")
        return first if self._second is None else [first, self._second._eval_loader("validation")]

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        from lm.data.prompts import PromptBatches, read_prompts

        data = PromptBatches(read_prompts(self.prompts), self.tokenizer)
        batches = _in_batches(np.arange(len(data)), self.eval_batch_size)
        return self._loader(data, EpochBatchSampler(lambda epoch: batches))

    def _eval_loader(self, split: str) -> DataLoader:
        corpus = self.corpus(split)
        make = sliding_windows if self.evaluation == "full" else first_windows
        windows = corpus.with_targets(make(corpus.offsets, self.sequence_length))
        data = WindowBatches(corpus, windows, self.tokenizer, width=None, with_bytes=True)
        # Rows of similar length together, for little padding; longest first, so that memory runs out at once if at all.
        size = min(self.eval_batch_size, -(-len(data) // rank_and_processes()[1]))
        batches = _in_batches(np.argsort(-windows.length, kind="stable"), size)
        return self._loader(data, EpochBatchSampler(lambda epoch: batches))

    def _loader(self, data: Dataset, sampler: EpochBatchSampler) -> DataLoader:
        workers = self.num_workers
        return self.device_loader(data, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)


def _in_batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[begin : begin + size] for begin in range(0, len(order), size)]
