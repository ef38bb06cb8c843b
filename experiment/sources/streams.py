"""A source of texts read as it comes, for corpora that are larger than the disk."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from experiment.errors import InputError
from experiment.sources.files import datasets_library, local_files, no_split_or_raise, row_features
from experiment.sources.hub import look_for_hub, newest_revision
from experiment.sources.rows import read_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def stream_texts(
    path: str,
    split: str,
    column: str = "text",
    demo: "Callable[[str], Dataset | None] | None" = None,
    revision: str | None = None,
) -> "IterableDataset | None":
    """One split of a source, as `load_texts` has it, but neither downloaded nor cached.

    Returns:
        The split, or None where this source has no such split.

    Raises:
        InputError: The path does not exist, the hub cannot be reached, or the column is missing.
    """
    if path == "demo" and demo is not None:
        texts = demo(split)
        return None if texts is None else texts.to_iterable_dataset()
    datasets = datasets_library()
    files = local_files(path)
    if files is None:
        look_for_hub()
        try:
            return datasets.load_dataset(path, split=split, streaming=True, revision=newest_revision(path, revision))
        except Exception as error:
            return no_split_or_raise(path, error)
    if split not in files:
        return None
    arguments = {"files": files[split], "columns": (column,)}  # a list would be shards
    features = row_features(files[split], [column])
    return datasets.IterableDataset.from_generator(read_rows, gen_kwargs=arguments, features=features)


def blocks(stream: "IterableDataset", size: int, where: str, column: str = "text") -> Iterator[tuple[list[Any], dict]]:
    """The column in lists of ``size`` texts, each with the state of the stream after it, from which to go on.

    Raises:
        InputError: The source cannot be read on, or lacks the column.
    """
    batches = stream.iter(batch_size=size)
    while True:
        try:
            batch = next(batches, None)
        except InputError:
            raise
        except Exception as error:  # of the hub's data sets, every format has its own
            cause = " ".join(str(error.__cause__ or error).split())[:200]
            raise InputError(f"{where} cannot be read ({cause}): expected whole files of one format") from error
        if batch is None:
            return
        if column not in batch:
            raise InputError(
                f"{where} has no column {column!r}: it has {', '.join(batch)}; rename the one that is meant"
            )
        yield batch[column], stream.state_dict()
