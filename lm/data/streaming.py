"""Training sequences made while reading the stories, for corpora that do not fit on the disk.

Stories come in blocks and are shuffled within a block. After the last story the stream restarts, with another
order within each block. A reader is one worker of one process; each has its own share of the stories.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from experiment.errors import InputError
from experiment.sources.streams import blocks, stream_texts
from lm.data.completions import Rows, encode_stories, story_columns
from lm.data.corpus import positions_in
from lm.data.demo_stories import demo_stories
from lm.data.tokenizer import StoryTokenizer

BLOCK = 2_000  # stories; a resumed reader rereads at most this many
GIVEN, START = 1 << 32, 1 << 33  # bits of a token: not trained on; first of a story
Position = dict[str, Any]  # plain values: where a reader's next batch starts


@dataclass(eq=False)
class StoryStream(IterableDataset):
    """Endless batches as from `WindowBatches`, each with a ``reader`` and the ``position`` from which that reader
    continues after this batch.

    Args:
        path: As ``--data.path``.
        tokenizer: Makes the token ids.
        sequence_length: T, targets of a sequence.
        batch_size: B, sequences of a batch.
        packing: Join stories into full sequences; else one story per sequence, truncated or padded.
        seed: Of the order within the blocks.
        rank: Of this process.
        processes: Their number.
        progress: The progress of this process's readers.
        revision: As ``--data.revision``.
        with_positions: Add them to the batches.

    Raises:
        InputError: The source cannot be read, or gives a reader no story.
    """

    path: str
    tokenizer: StoryTokenizer
    sequence_length: int
    batch_size: int
    packing: bool
    seed: int
    rank: int = 0
    processes: int = 1
    progress: "StreamProgress" = field(default_factory=lambda: StreamProgress())
    revision: str | None = None
    with_positions: bool = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.progress.finish()  # an epoch ended by trainer.limit_train_batches
        worker = get_worker_info()
        if worker is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        workers = 1 if worker is None else worker.num_workers
        # The loader starts with its first worker, whichever was next when the run was saved.
        reader = (self.progress.batches + (0 if worker is None else worker.id)) % workers
        share, shares = self.rank * workers + reader, self.processes * workers
        start = {"epoch": 0, "block": 0, "stream": None, "carry": [], "done": 0}
        position = deepcopy(self.progress.positions.get(reader, start))
        while True:
            stories = 0
            for block, after in self._blocks(position["stream"], share, shares):
                rows, carry = self._rows(block, position, share)
                stories += len(rows)
                for begin in range(position["done"] * self.batch_size, len(rows), self.batch_size):
                    position["done"] += 1
                    batch = self._batch(rows[begin : begin + self.batch_size])
                    yield batch | {"reader": reader, "position": deepcopy(position)}
                position |= {"block": position["block"] + 1, "stream": after, "carry": carry, "done": 0}
            if stories == 0 and not position["carry"]:
                raise InputError(f"data.path {self.path!r} gives reader {share + 1} of {shares} no story to train on")
            position |= {"epoch": position["epoch"] + 1, "block": 0, "stream": None}

    @property
    def _name(self) -> str:
        return f"data.path {self.path!r} (train)"

    def _blocks(self, state: dict | None, share: int, shares: int) -> Iterator[tuple[Rows, dict]]:
        from datasets.distributed import split_dataset_by_node

        stream = stream_texts(self.path, "train", story_columns, demo_stories, self.revision)
        if shares > 1:
            stream = split_dataset_by_node(stream, share, shares)
        if state is not None:
            stream.load_state_dict(deepcopy(state))
        return blocks(stream, BLOCK, self._name, story_columns)

    def _rows(self, block: Rows, position: Position, share: int) -> tuple[list[np.ndarray], list]:
        """The sequences of a block that fill whole batches, and the tokens that are left for the next block; with the
        bits of `GIVEN` and `START`."""
        encoded, learned = encode_stories(block, self.tokenizer, self._name)
        place = position["epoch"], share, position["block"]
        tokens = []
        for i in np.random.default_rng([self.seed, *place]).permutation(len(encoded)):
            story = np.array(encoded[i], dtype=np.int64)
            if learned is not None:
                story[~np.array(learned[i])] |= GIVEN
            story[0] |= START
            tokens.append(story.tolist())
        length, size = self.sequence_length, self.batch_size
        if not self.packing:
            cut = [story[: length + 1] for story in tokens]
            rows = [*position["carry"], *(row for row in cut if any(token & GIVEN == 0 for token in row[1:]))]
            whole = len(rows) // size * size
            return [np.array(row) for row in rows[:whole]], rows[whole:]
        flat = np.array([*position["carry"], *(token for story in tokens for token in story)], dtype=np.int64)
        whole = max(0, len(flat) - 1) // (length * size) * size
        rows = [flat[i * length : (i + 1) * length + 1] for i in range(whole)]
        return rows, flat[whole * length :].tolist()  # the last target of the last row is the next one's first input

    def _batch(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        tokens = np.full((len(rows), self.sequence_length + 1), self.tokenizer.pad_id | GIVEN, dtype=np.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        batch = {"tokens": (tokens & (GIVEN - 1)).astype(np.int32), "loss_mask": tokens[:, 1:] & GIVEN == 0}
        if self.with_positions:
            batch["positions"] = positions_in(tokens[:, :-1] & START > 0).astype(np.int32)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class StreamProgress:
    """The progress of this process's readers, by the batches trained on.

    Args:
        cut: Data options that decide how the stream is cut into batches; a resume needs the same ones.
    """

    def __init__(self, cut: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.cut = cut
        self.positions: dict[int, Position] = {}
        self.batches = 0  # done
        self._begun: tuple[int, Position] | None = None

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Record the next batch to train on, and return it without its position."""
        self.finish()
        self._begun = batch.pop("reader"), batch.pop("position")
        return batch

    def finish(self) -> None:
        """Mark the current batch as done."""
        if self._begun is not None:
            reader, self.positions[reader] = self._begun
            self.batches += 1
            self._begun = None

    def state(self, processed: bool) -> dict[str, Any]:
        """The state as plain values; ``processed`` says whether the current batch is done too."""
        if processed:
            self.finish()
        return {"positions": deepcopy(self.positions), "batches": self.batches}

    def load(self, state: dict[str, Any]) -> None:
        self.positions, self.batches = state["positions"], state["batches"]

    def state_of_processes(self, trainer: Trainer) -> dict[str, Any]:
        """The current states of all processes during training."""
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        state = self.state(processed=batches.processed == batches.ready)
        processes = [state] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(processes, state)
        return {"processes": processes, **self.cut}

    def load_state_of_processes(self, state: dict[str, Any], trainer: Trainer) -> None:
        """Resume from a checkpoint's state.

        Raises:
            InputError: That run did not stream, or its position does not fit the processes, workers or batches.
        """
        if "processes" not in state:
            raise InputError("this run did not stream its data: resume it with --data.streaming false")
        if (found := len(state["processes"])) != trainer.world_size:
            raise InputError(
                f"this run streamed with {found} processes: resume it with as many, since each has its own share "
                "of the stories"
            )
        for name, now in self.cut.items():
            if (before := state.get(name, now)) != now:
                raise InputError(
                    f"data.{name} {now}: this run streamed with {before}, on which its position depends; "
                    f"give --data.{name} {before}"
                )
        self.load(state["processes"][trainer.global_rank])


def unchanged(batch: Any) -> Any:
    """The collate_fn for ready-made batches."""
    return batch
