"""TinyStories, or any other stories, as batches of token ids.

Each split is tokenised once, on all cores, into a file of token ids (``bos story eos bos story eos ...``) beside the
offsets of its stories. From then on it is memory-mapped: a sample is a window of that file, and a batch is gathered in
one numpy indexing operation, so that the loader is never what the model waits for.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from experiment.batches import BatchSchedule, ResumableDataModule, rank_and_processes
from experiment.cache import cached_folder
from experiment.errors import InputError
from experiment.progress import console, progress
from experiment.sources import load_texts, source_fingerprint
from experiment.streams import blocks, stream_texts
from lm.stories import demo_stories
from lm.streaming import StoryStream, StreamProgress
from lm.tokenizer import StoryTokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset as Texts

Evaluation = Literal["full", "report"]
FORMAT = 1  # of the cached folders; raise it when what is written, or what decides it, changes
CHUNK = 2_000  # stories tokenised at a time, which bounds the memory
TRAINING_STORIES = 200_000  # that a tokenizer is trained on, at most
HELD_OUT = 100  # one story in so many becomes validation where the source has none


class Corpus:
    """The token ids of a split, memory-mapped; story i is ``tokens[offsets[i] : offsets[i + 1]]``, from bos to eos."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = json.loads((folder / "about.json").read_text())
        self.offsets: np.ndarray = np.load(folder / "offsets.npy")  # (stories + 1,) int64

    @cached_property
    def tokens(self) -> np.memmap:
        return np.memmap(self.folder / "tokens.bin", dtype=self.about["dtype"], mode="r")

    def __getstate__(self) -> dict[str, Any]:  # for workers that are spawned: they map the file, not copy it
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


def write_corpus(texts: "Texts", tokenizer: StoryTokenizer, folder: Path, name: str, note: str = "") -> None:
    """Tokenises the column ``text`` into a folder that `Corpus` reads, in bounded memory. Empty stories are left out.

    Raises:
        InputError: all stories are empty, or the column holds something that is not text.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    bos, eos = (tokenizer.bos_id,), (tokenizer.eos_id,)
    lengths, empty = [np.zeros(1, dtype=np.int64)], 0
    with open(folder / "tokens.bin", "wb") as file, progress(f"tokenising {name}", len(texts)) as advance:
        for begin in range(0, len(texts), CHUNK):
            column = texts[begin : begin + CHUNK]["text"]
            stories = [story for story in column if story is not None and str(story).strip()]
            if odd := next((story for story in stories if not isinstance(story, str)), None):
                raise InputError(f"column 'text' of {name} holds {odd!r}: expected text; choose another column or file")
            rows = tokenizer.encode_batch(stories)
            sizes = np.fromiter(map(len, rows), np.int64, len(rows)) + 2
            flat = chain.from_iterable(chain(bos, row, eos) for row in rows)
            np.fromiter(flat, dtype, sizes.sum()).tofile(file)
            lengths.append(sizes)
            empty += len(column) - len(stories)
            advance(len(column))
    offsets = np.cumsum(np.concatenate(lengths))
    if len(offsets) == 1:
        raise InputError(f"all stories of {name} are empty: expected at least one with text")
    notes = [note] if note else []
    if empty:
        notes.append(f"{name}: {empty:,} empty {'story' if empty == 1 else 'stories'} left out")
    np.save(folder / "offsets.npy", offsets)
    (folder / "about.json").write_text(json.dumps({"dtype": dtype.name, "notes": notes}))


class Windows(NamedTuple):
    """Samples as pieces of the token file. Window i holds ``length[i] - 1`` inputs, and as many targets, one later."""

    start: np.ndarray  # (n,) int64, place in the token file
    length: np.ndarray  # (n,) int64, tokens, at most sequence_length + 1
    skip: np.ndarray  # (n,) int64, first targets that do not count, since an earlier window has counted them
    story: np.ndarray | None = None  # (n,) int64, which story it is from


def first_windows(offsets: np.ndarray, sequence_length: int) -> Windows:
    """One window a story: its first ``sequence_length + 1`` tokens, bos included."""
    length = np.minimum(np.diff(offsets), sequence_length + 1)
    return Windows(offsets[:-1], length, np.zeros_like(length), np.arange(len(length)))


def packed_windows(total: int, sequence_length: int) -> Windows:
    """The whole file in blocks: each of its tokens but the first is the target of exactly one window."""
    start = np.arange(0, total - 1, sequence_length)
    return Windows(start, np.minimum(total - start, sequence_length + 1), np.zeros_like(start))


def sliding_windows(offsets: np.ndarray, sequence_length: int) -> Windows:
    """Every target of every story exactly once. Over stories that are longer than one window it slides by half of
    it, so that all later targets have at least half of a window before them."""
    stride = sequence_length // 2
    targets = np.diff(offsets) - 1
    count = 1 + np.maximum(0, -(-(targets - sequence_length) // stride))
    story = np.repeat(np.arange(len(count)), count)
    order = np.arange(len(story)) - np.repeat(np.cumsum(count) - count, count)  # 0, 1, ... within each story
    start = offsets[story] + order * stride
    length = np.minimum(offsets[story + 1] - start, sequence_length + 1)
    return Windows(start, length, np.where(order > 0, sequence_length - stride, 0), story)


class WindowBatches(Dataset):
    """``self[indices]`` is the batch of these windows, padded on the right; pads are told by position, never by id.

    Args:
        corpus: where the tokens are.
        windows: what the samples are.
        tokenizer: for the id of pads and the bytes of tokens.
        width: inputs of every row; None for as many as the longest row of the batch has.
        with_bytes: add text_weights and bytes, which bits per byte need; the windows must know their stories.
    """

    def __init__(
        self, corpus: Corpus, windows: Windows, tokenizer: StoryTokenizer, width: int | None, with_bytes: bool = False
    ) -> None:
        self.corpus, self.windows, self.width, self.with_bytes = corpus, windows, width, with_bytes
        self.pad_id = tokenizer.pad_id
        self.bytes_per_token, self.prefix_bytes = tokenizer.bytes_per_token, tokenizer.prefix_bytes

    def __len__(self) -> int:
        return len(self.windows.start)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """input_ids and targets (B, T) int64, weights (B, T) float32: 1 for a target that counts, else 0. With bytes
        also text_weights (B, T) float32, which are 0 for eos too, and bytes (B, T) int64 of each target they count."""
        indices = np.asarray(indices, dtype=np.int64)
        start, length = self.windows.start[indices, None], self.windows.length[indices, None]
        width = int(length.max()) - 1 if self.width is None else self.width
        column = np.arange(width + 1)
        place = start + np.minimum(column, length - 1)  # (B, T + 1), in the file
        ids = self.corpus.tokens[place].astype(np.int64)
        ids[column >= length] = self.pad_id
        place, targets = place[:, 1:], ids[:, 1:]
        counted = (column[1:] < length) & (column[:-1] >= self.windows.skip[indices, None])
        batch = {"input_ids": ids[:, :-1], "targets": targets, "weights": counted.astype(np.float32)}
        if self.with_bytes:
            story = self.windows.story[indices]
            text = counted & (place != self.corpus.offsets[story + 1, None] - 1)  # the last token is eos
            first = place == self.corpus.offsets[story, None] + 1
            batch["text_weights"] = text.astype(np.float32)
            batch["bytes"] = (self.bytes_per_token[targets] - self.prefix_bytes * first) * text
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


class PromptBatches(Dataset):
    """``self[indices]`` is {"prompts": list of str, "input_ids": list of list of int (bos, then tokens)}."""

    def __init__(self, prompts: Sequence[str], tokenizer: StoryTokenizer) -> None:
        self.prompts = list(prompts)
        self.input_ids = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(self.prompts)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list]:
        return {"prompts": [self.prompts[i] for i in indices], "input_ids": [self.input_ids[i] for i in indices]}


class TinyStories(ResumableDataModule):
    """Stories as sequences of token ids: targets are the inputs shifted by one.

    Args:
        path: Where the stories are: a hub name, a local folder with train.* and validation.* files (parquet, JSON
            lines, CSV, text; column ``text``), a local file, or ``demo`` for the embedded synthetic corpus.
        tokenizer: A hub name, a local folder or file (tokenizer.json, SentencePiece .model, llama2.c .bin), or
            ``train`` for one that is trained on the stories.
        vocab_size: Size of a tokenizer that is trained; one that is loaded has its own.
        sequence_length: Tokens that the model sees at once.
        packing: Join the training stories into full sequences, so that no token is lost. Otherwise each story is
            a sequence of its own, cut off or padded.
        batch_size: Training sequences a step and process.
        eval_batch_size: Sequences a step and process of validation, test and prediction; results do not depend on it.
        evaluation: ``full``, every token of every story predicted exactly once, or ``report``, only the first
            sequence_length tokens of each story.
        prompts: Beginnings of stories for ``predict``: a list, or a text file with one a line, or a JSON or JSON
            lines file of strings or of objects with a ``prompt``.
        seed: Of the order of the training sequences.
        num_workers: Processes that prepare batches; 0 prepares them in the training process, which is fast enough.
        streaming: Read the training stories while training, from the hub or from files, rather than tokenise them all
            first; for corpora larger than the disk. They are shuffled within blocks only, and max_steps ends the run.

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
        batch_size: int = 32,
        eval_batch_size: int = 64,
        evaluation: Evaluation = "full",
        prompts: list[str] | str | None = None,
        seed: int = 1234,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        least = {"sequence_length": (sequence_length, 2), "num_workers": (num_workers, 0)}
        least |= {"batch_size": (batch_size, 1), "eval_batch_size": (eval_batch_size, 1), "seed": (seed, 0)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise InputError(f"data.{name} {value}: expected at least {minimum}")
        if evaluation not in get_args(Evaluation):
            raise InputError(f"data.evaluation {evaluation!r}: expected {' or '.join(get_args(Evaluation))}")
        self.path = path
        self.tokenizer_name = tokenizer
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.packing = packing
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.evaluation = evaluation
        self.prompts = prompts
        self.seed = seed
        self.num_workers = num_workers
        self.streaming = streaming
        self.stream_progress = StreamProgress()
        self._corpora: dict[str, Corpus] = {}

    @cached_property
    def tokenizer(self) -> StoryTokenizer:
        """Loaded, or trained and cached, when it is first asked for."""
        if self.tokenizer_name != "train":
            return load_tokenizer(self.tokenizer_name)
        key = {"source": source_fingerprint(self.path), "vocab_size": self.vocab_size, "format": FORMAT}
        if self.streaming:
            key["trained on"] = "the first stories"
        return load_tokenizer(cached_folder("tokenizers", key, self._train_tokenizer))

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, which the model's embedding must have."""
        return self.tokenizer.vocab_size

    def _train_tokenizer(self, folder: Path) -> None:
        if self.streaming:
            stream = stream_texts(self.path, "train", demo=demo_stories)
            texts = (text for block, _ in blocks(stream, CHUNK, self.path) for text in block)
            train_tokenizer((text for text in islice(texts, TRAINING_STORIES) if text), self.vocab_size).save(folder)
            return
        texts, _ = self._texts("train")
        texts = texts.select(range(0, len(texts), -(-len(texts) // TRAINING_STORIES)))
        stories = (story for begin in range(0, len(texts), CHUNK) for story in texts[begin : begin + CHUNK]["text"])
        train_tokenizer((story for story in stories if story), self.vocab_size).save(folder)

    def _texts(self, split: str) -> tuple["Texts", str]:
        """The texts of a split, and what the user should know about where they are from."""
        texts = self._streamed(split) if self.streaming else load_texts(self.path, split, ["text"], demo_stories)
        if split == "test":
            if texts is None:
                return self._texts("validation")[0], "the source has no test split: validation is used for test"
            return texts, ""
        if split == "validation" and texts is not None:
            return texts, ""
        if self.streaming:
            raise InputError(f"data.path {self.path!r} has no validation split, which data.streaming needs: add one")
        if split == "train" and load_texts(self.path, "validation", ["text"], demo_stories) is not None:
            return texts, ""
        # Which stories are held out must not depend on the run's seed: a model would be validated on what it
        # was trained on in an earlier run.
        whole = load_texts(self.path, "train", ["text"], demo_stories)
        if len(whole) < 2:
            raise InputError(f"data.path {self.path!r} has one story and no validation split: expected two or more")
        order = np.random.default_rng(0).permutation(len(whole))
        held, kept = np.split(order, [max(1, len(whole) // HELD_OUT)])
        if split == "train":
            return whole.select(np.sort(kept)), ""
        return whole.select(np.sort(held)), f"no validation split: {len(held):,} of the training stories held out"

    def _streamed(self, split: str) -> "Texts | None":
        """A split that is small enough for memory, without fetching the others."""
        from datasets import Dataset as Texts

        stream = stream_texts(self.path, split, demo=demo_stories)
        if stream is None:
            return None
        return Texts.from_dict({"text": [text for block, _ in blocks(stream, CHUNK, self.path) for text in block]})

    def corpus(self, split: str) -> Corpus:
        """The tokenised split (train, validation or test), from the cache, or made and cached now."""
        if split not in self._corpora:

            def build(folder: Path) -> None:
                texts, note = self._texts(split)
                write_corpus(texts, self.tokenizer, folder, f"{self.path} ({split})", note)

            key = {"source": source_fingerprint(self.path), "tokenizer": self.tokenizer.fingerprint}
            folder = cached_folder("tokens", key | {"split": split, "format": FORMAT}, build)
            self._corpora[split] = Corpus(folder)
            for note in self._corpora[split].about["notes"]:
                rank_zero_only(console.print)(note)
        return self._corpora[split]

    def setup(self, stage: str) -> None:
        splits = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
        for split in splits.get(stage, ()):
            if not (self.streaming and split == "train"):
                self.corpus(split)

    def train_dataloader(self) -> DataLoader:
        if self.streaming:
            return self._stream()
        corpus = self.corpus("train")
        if self.packing:
            windows = packed_windows(len(corpus.tokens), self.sequence_length)
        else:
            windows = first_windows(corpus.offsets, self.sequence_length)
        data = WindowBatches(corpus, windows, self.tokenizer, self.sequence_length)

        @lru_cache(maxsize=1)  # it is asked for its length many times
        def shuffled(epoch: int) -> list[np.ndarray]:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(data))
            return _in_batches(order, self.batch_size)

        return self._loader(data, self.resumable(BatchSchedule(shuffled, drop_uneven=True)))

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
        )
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is)

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
        return {"processes": processes, "num_workers": self.num_workers}

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
        self.stream_progress.load(state_dict["processes"][self.trainer.global_rank])

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        data = PromptBatches(read_prompts(self.prompts), self.tokenizer)
        batches = _in_batches(np.arange(len(data)), self.eval_batch_size)
        return self._loader(data, BatchSchedule(lambda epoch: batches))

    def _eval_loader(self, split: str) -> DataLoader:
        corpus = self.corpus(split)
        make = sliding_windows if self.evaluation == "full" else first_windows
        windows = make(corpus.offsets, self.sequence_length)
        data = WindowBatches(corpus, windows, self.tokenizer, width=None, with_bytes=True)
        # Every process must have a batch: one that has none would skip the validation that the others do together.
        processes = rank_and_processes()[1]
        if len(data) < processes:
            raise InputError(
                f"the {split} split of data.path {self.path!r} has {len(data)} sequences, fewer than the {processes} "
                "processes: take fewer, or more stories"
            )
        # Rows of like length together, so that little is padded; the longest first, so that memory fails at once.
        size = min(self.eval_batch_size, len(data) // processes)
        batches = _in_batches(np.argsort(-windows.length, kind="stable"), size)
        return self._loader(data, BatchSchedule(lambda epoch: batches))

    def _loader(self, data: Dataset, schedule: BatchSchedule) -> DataLoader:
        workers = self.num_workers
        return DataLoader(data, sampler=schedule, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_batches(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def read_prompts(prompts: list[str] | str | None) -> list[str]:
    """The prompts of a list, or of a file (.txt, one a line; .json or .jsonl, strings or objects with a ``prompt``).

    Raises:
        InputError: there are none, or the file is missing or holds something else.
    """
    if prompts is None:
        raise InputError("data.prompts is not given: expected a list of beginnings, or a file with one a line")
    if not isinstance(prompts, str):
        found, where = list(prompts), "data.prompts"
    else:
        path, where = Path(prompts).expanduser(), f"data.prompts {prompts!r}"
        if not path.is_file():
            as_list = json.dumps([prompts])
            raise InputError(f"{where} is no file: to give the prompt itself, write it as a list, '{as_list}'")
        try:
            text = path.read_text(encoding="utf-8")
            found = list(_prompts_in_json(path, text)) if path.suffix in (".json", ".jsonl") else text.splitlines()
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"{where} cannot be read ({error}): expected text with one prompt a line, or .json or .jsonl "
                "with strings or with objects that have a 'prompt'"
            ) from None
        if path.suffix not in (".json", ".jsonl"):
            found = [line for line in found if line.strip()]
    if odd := [prompt for prompt in found if not isinstance(prompt, str)]:
        raise InputError(f"{where} holds {odd[0]!r}: expected text, or an object with a 'prompt' that is text")
    if not found:
        raise InputError(f"{where} is empty: expected at least one beginning of a story")
    return found


def _prompts_in_json(path: Path, text: str) -> Iterator[Any]:
    lines = (line for line in text.split("\n") if line.strip())  # U+2028 may stand within a string
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    for row in rows:
        yield row["prompt"] if isinstance(row, dict) else row
