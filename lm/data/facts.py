"""What comparisons need to know of a run's data, and fit does not."""

from typing import Any


def facts_of(data: Any) -> dict[str, Any]:
    """Of a TextDataModule: targets and batches per epoch, unless streamed; the evaluated data, equal for runs whose
    bits per byte are comparable; and the tokenizer, equal for runs whose losses are."""
    tokenizer = data.tokenizer.fingerprint[:12]
    first = f"the first {data.sequence_length} tokens of tokenizer {tokenizer} of each story"
    read = "every token of every story" if data.evaluation == "full" else first
    facts = {"evaluated": f"{read} of {data.source.stories_id('validation')}", "tokenizer": tokenizer}
    if not data.streaming:
        windows = data.train_dataloader().dataset.windows
        facts |= {"tokens_per_epoch": int(data.corpus("train").num_targets(windows).sum())}
        facts |= {"batches_per_epoch": len(data.train_sampler.epoch_batches(0))}
    return facts
