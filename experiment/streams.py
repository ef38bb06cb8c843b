"""A source of texts read as it comes, for corpora that are larger than the disk."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.errors import InputError
from experiment.hub import look_for_hub
from experiment.sources import READERS, STORY_SEPARATOR, _datasets, _separated_stories, local_files

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


def stream_texts(
    path: str, split: str, column: str = "text", demo: "Callable[[str], Dataset | None] | None" = None
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
    datasets = _datasets()
    files = local_files(path)
    if files is not None and split not in files:
        return None
    if files is not None and files[split].stat().st_size == 0:
        raise InputError(f"{files[split]} is empty: expected at least one text")
    try:
        if files is None:
            look_for_hub()
            stream = datasets.load_dataset(path, split=split, streaming=True)
        elif _holds_separators(file := files[split]):
            kwargs = {"file": file, "identity": (0, 0)}  # nothing is cached here
            stream = datasets.IterableDataset.from_generator(_separated_stories, gen_kwargs=kwargs)
        else:
            reader = READERS[file.suffix]
            options = {"encoding_errors": "replace"} if reader == "text" else {}
            stream = datasets.load_dataset(
                reader, data_files={split: str(file)}, split=split, streaming=True, **options
            )
    except (ValueError, StopIteration) as error:
        if files is None and "split" in str(error):
            return None
        raise InputError(f"data.path {path} cannot be streamed ({' '.join(str(error).split())[:200]})") from error
    except (ConnectionError, OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            f"data.path {path!r} cannot be had from the hub ({type(error).__name__}): check the name and the network, "
            "or give a local folder with train.* and validation.* files, or demo"
        ) from error
    return stream


def _holds_separators(file: Path) -> bool:
    if READERS[file.suffix] != "text":
        return False
    with file.open("rb") as stream:
        return STORY_SEPARATOR.encode() in stream.read(1 << 20)


def blocks(stream: "IterableDataset", size: int, where: str, column: str = "text") -> Iterator[tuple[list[Any], dict]]:
    """The column in lists of ``size`` texts, each with the state of the stream after it, from which to go on.

    Raises:
        InputError: The source cannot be read on, or lacks the column.
    """
    batches = stream.iter(batch_size=size)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # every format has its own
            cause = " ".join(str(error.__cause__ or error).split())[:200]
            raise InputError(f"{where} cannot be read ({cause}): expected whole files of one format") from error
        if batch is None:
            return
        if column not in batch:
            raise InputError(
                f"{where} has no column {column!r}: it has {', '.join(batch)}; rename the one that is meant"
            )
        yield batch[column], stream.state_dict()
