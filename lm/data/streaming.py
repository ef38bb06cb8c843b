"""Training sequences made while the stories are read, for corpora that do not fit on the disk.

Stories come in blocks; within a block they are shuffled. After the last story the stream begins anew, with another
order within each block. A reader is one worker of one process; each has its own share of the stories.
"""

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from experiment.errors import InputError
from experiment.sources.streams import blocks, stream_texts
from lm.data.demo_stories import demo_stories
from lm.data.tokenizer import StoryTokenizer

BLOCK = 2_000  # stories; a resumed reader reads as many again at most
Position = dict[str, Any]  # plain values: where a reader's next batch begins


class StoryStream(IterableDataset):
    """Endless batches of ``tokens`` and ``loss_mask`` as `WindowBatches` gives them, each with a ``reader`` and the
    ``position`` from which that reader goes on after this batch.

    Args:
        path: As ``--data.path``.
        tokenizer: Makes the token ids.
        sequence_length: T, targets of a sequence.
        batch_size: B, sequences of a batch.
        packing: Join stories into full sequences; else one story a sequence, cut off or padded.
        seed: Of the order within the blocks.
        rank: Of this process.
        processes: Their number.
        progress: How far the readers of this process have come.
        revision: As ``--data.revision``.

    Raises:
        InputError: The source cannot be read, or gives a reader no story.
    """

    def __init__(
        self,
        path: str,
        tokenizer: StoryTokenizer,
        sequence_length: int,
        batch_size: int,
        packing: bool,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        progress: "StreamProgress | None" = None,
        revision: str | None = None,
    ) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.packing = packing
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.revision = revision
        self.progress = progress or StreamProgress()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.progress.finish()  # an epoch that trainer.limit_train_batches has ended
        worker = get_worker_info()
        if worker is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not come along to a forked process
        workers = 1 if worker is None else worker.num_workers
        # The loader asks its workers in turn, from the first on, whichever was next when the run was saved.
        reader = (self.progress.batches + (0 if worker is None else worker.id)) % workers
        share, shares = self.rank * workers + reader, self.processes * workers
        start = {"epoch": 0, "block": 0, "stream": None, "carry": [], "done": 0}
        position = deepcopy(self.progress.positions.get(reader, start))
        while True:
            stories = 0
            for texts, after in self._blocks(position["stream"], share, shares):
                rows, carry = self._rows(texts, position, share)
                stories += len(rows)
                for begin in range(position["done"] * self.batch_size, len(rows), self.batch_size):
                    position["done"] += 1
                    batch = self._batch(rows[begin : begin + self.batch_size])
                    yield batch | {"reader": reader, "position": deepcopy(position)}
                position |= {"block": position["block"] + 1, "stream": after, "carry": carry, "done": 0}
            if stories == 0 and not position["carry"]:
                raise InputError(f"data.path {self.path!r} gives reader {share + 1} of {shares} no story to train on")
            position |= {"epoch": position["epoch"] + 1, "block": 0, "stream": None}

    def _blocks(self, state: dict | None, share: int, shares: int) -> Iterator[tuple[list[str], dict]]:
        from datasets.distributed import split_dataset_by_node

        stream = stream_texts(self.path, "train", demo=demo_stories, revision=self.revision)
        if shares > 1:
            stream = split_dataset_by_node(stream, share, shares)
        if state is not None:
            stream.load_state_dict(deepcopy(state))
        return blocks(stream, BLOCK, f"data.path {self.path!r} (train)")

    def _rows(self, texts: Sequence[str | None], position: Position, share: int) -> tuple[list[np.ndarray], list]:
        """The sequences of a block that fill whole batches, and the tokens that are left for the next block."""
        stories = [text for text in texts if isinstance(text, str) and text.strip()]
        place = position["epoch"], share, position["block"]
        order = np.random.default_rng([self.seed, *place]).permutation(len(stories))
        encoded = self.tokenizer.encode_batch([stories[i] for i in order])
        tokens = [[self.tokenizer.bos_id, *ids, self.tokenizer.eos_id] for ids in encoded]
        length, size = self.sequence_length, self.batch_size
        if not self.packing:
            rows = [*position["carry"], *(story[: length + 1] for story in tokens)]
            whole = len(rows) // size * size
            return [np.array(row) for row in rows[:whole]], rows[whole:]
        flat = np.array([*position["carry"], *(token for story in tokens for token in story)], dtype=np.int64)
        whole = max(0, len(flat) - 1) // (length * size) * size
        rows = [flat[i * length : (i + 1) * length + 1] for i in range(whole)]
        return rows, flat[whole * length :].tolist()  # the last target of the last row is the next one's first input

    def _batch(self, rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
        tokens = np.full((len(rows), self.sequence_length + 1), self.tokenizer.pad_id, dtype=np.int32)
        loss_mask = np.zeros((len(rows), self.sequence_length), dtype=bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            loss_mask[i, : len(row) - 1] = True
        return {"tokens": torch.from_numpy(tokens), "loss_mask": torch.from_numpy(loss_mask)}


class StreamProgress:
    """How far the readers of this process have come, by the batches that were trained on."""

    def __init__(self) -> None:
        self.positions: dict[int, Position] = {}
        self.batches = 0  # done
        self._begun: tuple[int, Position] | None = None

    def begin(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Note the batch that is trained on next, and give it back without its position."""
        self.finish()
        self._begun = batch.pop("reader"), batch.pop("position")
        return batch

    def finish(self) -> None:
        """The batch that was begun is done."""
        if self._begun is not None:
            reader, self.positions[reader] = self._begun
            self.batches += 1
            self._begun = None

    def state(self, processed: bool) -> dict[str, Any]:
        """Plain values; ``processed`` tells whether the batch that was begun is done too."""
        if processed:
            self.finish()
        return {"positions": deepcopy(self.positions), "batches": self.batches}

    def load(self, state: dict[str, Any]) -> None:
        self.positions, self.batches = state["positions"], state["batches"]
