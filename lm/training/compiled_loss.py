"""The loss of a batch as one compiled function, on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.model.decoder import Decoder
from lm.model.loss import summed_loss

MOST_GRAPHED = 50_000_000  # weights; kernels of larger models take longer than their launch, which graphs save


class CompiledLoss:
    """`summed_loss` of one decoder as one function that torch.compile makes, for batches of one shape."""

    def __init__(self, decoder: Decoder, use_graphs: bool, rows: int = 0) -> None:
        """
        Args:
            decoder: Whose losses.
            rows: Of a batch. One that has fewer, as the last of an epoch, gets rows that do not count, so that a run
                that is resumed there has the same code.
            use_graphs: Replay it as CUDA graphs. Each replay overwrites the results and gradients of the one before, so
                that gradients cannot be accumulated.
        """
        self.decoder, self.use_graphs = decoder, use_graphs
        self.rows = rows

        def loss(*batch: Tensor) -> tuple[Tensor, Tensor]:
            return summed_loss(decoder, *batch)

        self.function = torch.compile(loss, dynamic=False, mode="reduce-overhead" if use_graphs else None)

    def __call__(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as of `summed_loss`."""
        self.rows = max(self.rows, len(batch[0]))
        if missing := self.rows - len(batch[0]):
            batch = [F.pad(rows, (0, 0, 0, missing)) for rows in batch]
        if self.use_graphs:
            self.decoder.zero_grad()  # while they are still what the last replay made them
            torch.compiler.cudagraph_mark_step_begin()
        return self.function(*batch)
