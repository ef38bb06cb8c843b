"""A source of texts read as a stream, for corpora larger than the disk."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from experiment.errors import InputError
from experiment.sources.files import Columns, chosen, datasets_library, load_from_hub, local_files, row_features
from experiment.sources.rows import read_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def stream_texts(
    path: str,
    split: str,
    columns: Columns = ("text",),
    demo: "Callable[[str], Dataset | None] | None" = None,
    revision: str | None = None,
) -> "IterableDataset | None":
    """One split of a source, as from `load_texts`, but neither downloaded nor cached.

    Returns:
        The split, or None if the source does not have it.

    Raises:
        InputError: The path does not exist, the hub cannot be reached, or the column is missing.
    """
    if path == "demo" and demo is not None:
        texts = demo(split)
        return None if texts is None else texts.to_iterable_dataset()
    files = local_files(path)
    if files is None:
        return load_from_hub(path, split, revision, streaming=True)
    if split not in files:
        return None
    columns = tuple(chosen(columns, files[split]))
    arguments = {"files": files[split], "columns": columns}  # a list would be shards
    features = row_features(files[split], columns)
    return datasets_library().IterableDataset.from_generator(read_rows, gen_kwargs=arguments, features=features)


def blocks(
    stream: "IterableDataset", size: int, where: str, columns: Columns = ("text",)
) -> Iterator[tuple[dict[str, Sequence[Any]], dict]]:
    """The columns in lists of ``size`` values, each with the stream's state after it, to resume from.

    Raises:
        InputError: Reading the source failed, or it lacks a column.
    """
    batches = stream.iter(batch_size=size)
    while True:
        try:
            batch = next(batches, None)
        except InputError:
            raise
        except Exception as error:  # hub data sets raise different ones for each format
            cause = " ".join(str(error.__cause__ or error).split())[:200]
            raise InputError(f"{where} cannot be read ({cause}): expected whole files of one format") from error
        if batch is None:
            return
        names = columns(list(batch), where) if callable(columns) else columns
        if missing := [column for column in names if column not in batch]:
            raise InputError(
                f"{where} has no column {missing[0]!r}: it has {', '.join(batch)}; rename the column that you mean"
            )
        yield {column: batch[column] for column in names}, stream.state_dict()
