"""The loss of a batch as one compiled function, on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.model.decoder import Decoder
from lm.model.loss import summed_loss

MOST_GRAPHED = 50_000_000  # weights; larger models' kernels take longer than the launches that graphs save


class CompiledLoss:
    """`summed_loss` of one decoder, compiled by torch.compile as one function, for batches of one shape."""

    def __init__(self, decoder: Decoder, use_graphs: bool, rows: int = 0) -> None:
        """
        Args:
            decoder: The model.
            rows: Rows per batch. A smaller batch, such as an epoch's last, is filled with rows that do not count: a run
                resumed there uses the same code.
            use_graphs: Replay it as CUDA graphs. Each replay overwrites the previous results and gradients, so
                that gradients cannot be accumulated.
        """
        self.decoder, self.use_graphs = decoder, use_graphs
        self.rows = rows

        def loss(*batch: Tensor) -> tuple[Tensor, Tensor]:
            return summed_loss(decoder, *batch)

        self.function = torch.compile(loss, dynamic=False, mode="reduce-overhead" if use_graphs else None)

    def __call__(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and results as in `summed_loss`."""
        self.rows = max(self.rows, len(batch[0]))
        if missing := self.rows - len(batch[0]):
            batch = [F.pad(rows, (0, 0, 0, missing)) for rows in batch]
        if self.use_graphs:
            self.decoder.zero_grad()  # before the next replay overwrites the gradients
            torch.compiler.cudagraph_mark_step_begin()
        return self.function(*batch)
