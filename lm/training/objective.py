"""From a batch to the sum of its losses: in plain code, or as one compiled function on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.model.decoder import Decoder
from lm.model.loss import linear_cross_entropy

IGNORED = -100  # cross_entropy's own mark of a target that does not count
MOST_GRAPHED = 50_000_000  # weights; kernels of larger models take longer than their launch, which graphs save


def summed_loss(
    decoder: Decoder, tokens: Tensor, loss_mask: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all tokens that count, in nats, and their number.

    Args:
        decoder: Whose losses.
        tokens: (B, T + 1) of any integer type: T inputs and, one later, T targets.
        loss_mask: (B, T) bool, whether a target counts.
        positions: (B, T) of the inputs, as of `Decoder.hidden_states`.
    """
    tokens = tokens.long()
    hidden = decoder.hidden_states(tokens[:, :-1], positions=positions).flatten(0, 1)
    targets, counted = tokens[:, 1:].flatten(), loss_mask.flatten()
    # Compiling joins what follows to a few kernels that read the logits once.
    if torch.compiler.is_compiling() or not has_plain_head(decoder):
        logits = decoder.logits(hidden).float()
        loss = F.cross_entropy(logits, targets.masked_fill(~counted, IGNORED), ignore_index=IGNORED, reduction="sum")
    else:
        loss = linear_cross_entropy(hidden, decoder.head_weight, targets, counted.float())
    return loss, counted.sum()


def has_plain_head(decoder: Decoder) -> bool:
    """Whether the head is a matrix and no more, without an adapter of its own."""
    return decoder.head is None or isinstance(decoder.head, torch.nn.Linear)


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
