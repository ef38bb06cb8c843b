"""Warnings that users cannot act on, each with the reason for hiding it."""

import logging
import os
import re
import warnings

from experiment.console import expect_any_text

# Regular expressions over the message, and the category.
IGNORED: tuple[tuple[str, type[Warning]], ...] = (
    # torch's own tree utilities deprecate a call that lightning 2.6.6 still makes.
    (r".*isinstance\(treespec, LeafSpec\).*", FutureWarning),
    # Our loaders assemble whole batches by one gather from a memory map: workers would only slow them.
    (r".*does not have many workers which may be a bottleneck.*", UserWarning),
    # Resuming in the middle of an epoch is exact here: the data module keeps the position (pytorch-lightning#20550).
    (r".*resuming from a checkpoint that ended before the epoch ended.*", UserWarning),
    # Short runs and tests log less often than Lightning's default interval expects.
    (r".*The number of training batches .* is smaller than the logging interval.*", UserWarning),
    # The batch size is only needed to average metrics; ours are torchmetrics that carry their own weights.
    (r".*Trying to infer the `batch_size` from an ambiguous collection.*", UserWarning),
    # Metrics are summed over all processes by torchmetrics before they are logged.
    (r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*", UserWarning),
    # Predictions are written as they come; nothing needs to know their places in the data set.
    (r".*Couldn't infer the batch indices fetched from your dataloader.*", UserWarning),
)


# Lightning's start-up messages, as regular expressions. Its other messages were requested: the
# profiler's table, the summary of the model, why a callback has stopped the run.
UNASKED = re.compile(
    r"(\[rank: \d+\] )?((GPU|TPU|HPU|MPS) available|LOCAL_RANK|Seed set to|Using .*(precision|AMP)|Restor(ing|ed) |"
    r"Loaded model weights|`Trainer\(|Loading `train_dataloader` to estimate|.*Tip: |Initializing distributed|"
    r"-{20,}\ndistributed_backend|You are using a CUDA device|SLURM auto-requeueing|Multi-processing is handled by)"
)


def _was_asked_for(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not UNASKED.match(record.getMessage().strip())


def quiet_libraries(debug: bool = False) -> None:
    """Show only what a user can act on; ``debug`` shows everything. Any character can be printed."""
    expect_any_text()
    # Must be set before the first fork, else the tokenizers library warns in every loader process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # jsonargparse >= 4.49 deprecates calls that lightning 2.6.6 still makes (pytorch-lightning#21255).
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    if debug:
        return
    # A hub that cannot be reached is reported by our own line, not by one for each attempt.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for message, category in IGNORED:
        warnings.filterwarnings("ignore", message=message, category=category)
    names = [f"fabric.utilities.{name}" for name in ("rank_zero", "seed", "distributed")]
    for name in (*names, "pytorch.utilities.rank_zero", "pytorch.trainer.connectors.signal_connector"):
        logging.getLogger(f"lightning.{name}").addFilter(_was_asked_for)  # once, however often it is added
