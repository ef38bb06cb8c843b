"""Where texts come from: a hub name, a local folder, a local file, or the embedded ``demo`` corpus.

Both experiments read through ``load_texts``, so that ``--data.path`` means the same everywhere.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from experiment.errors import InputError
from experiment.hub import look_for_hub
from experiment.progress import console

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
STORY_SEPARATOR = "<|endoftext|>"  # stands between the stories of the official TinyStories text files


def local_files(path: str) -> dict[str, Path] | None:
    """The files of a local source by split, or None where ``path`` is no local path (``demo`` or a hub name).

    A folder holds ``train.*``, ``validation.*`` and ``test.*`` (``valid.*`` and ``val.*`` are understood), of the
    formats parquet, JSON lines, CSV and text. A file is a training split.

    Raises:
        InputError: The path looks like a local one and does not exist, or holds nothing that can be read.
    """
    source = Path(path).expanduser()
    if path == "demo":
        return None
    if source.is_dir():
        files = {}
        for file in sorted(source.iterdir()):
            stem = {"valid": "validation", "val": "validation"}.get(file.stem, file.stem)
            if stem in SPLITS and file.suffix in READERS:
                files[stem] = file
        if "train" not in files:
            raise InputError(f"data.path {path} holds no train.* file: expected train and validation as {formats()}")
        return files
    if source.is_file():
        if source.suffix not in READERS:
            raise InputError(f"data.path {path} has the unknown ending {source.suffix!r}: expected {formats()}")
        return {"train": source}
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or source.suffix in READERS
    if looks_local:
        raise InputError(
            f"data.path {path!r} does not exist: expected a folder, a file, a hub name such as "
            "roneneldan/TinyStories, or demo"
        )
    return None


def formats() -> str:
    return ", ".join(READERS)


def source_fingerprint(path: str) -> str:
    """What tells one source from another, without reading it: files by path, size and time; else the name itself."""
    files = local_files(path)
    if files is None:
        return path
    identities = {}
    for split, file in files.items():
        stat = file.stat()
        identities[split] = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    return json.dumps(identities, sort_keys=True)


def load_texts(
    path: str,
    split: str,
    columns: Sequence[str] = ("text",),
    demo: Callable[[str], "Dataset | None"] | None = None,
) -> "Dataset | None":
    """One split of a source of texts, memory-mapped, with the asked columns.

    Args:
        path: A hub name, a local folder or file, or ``demo``.
        split: ``train``, ``validation`` or ``test``.
        columns: Columns that must be there; the others are left out.
        demo: Makes a split of the embedded corpus.

    Returns:
        The split, or None where this source has no such split.

    Raises:
        InputError: The path does not exist, the hub cannot be reached, a file is empty or cannot be read, or a
            column is missing.
    """
    if path == "demo" and demo is not None:
        return demo(split)
    files = local_files(path)
    if files is None:
        dataset = _from_hub(path, split)
    elif split in files:
        dataset = _from_file(files[split])
    else:
        return None
    if dataset is None:
        return None
    where = files[split] if files else f"{path} ({split})"
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise InputError(
            f"{where} has no column {missing[0]!r}: it has {', '.join(dataset.column_names)}; "
            "rename the one that is meant"
        )
    if len(dataset) == 0:
        raise InputError(f"{where} is empty: expected at least one row with a {columns[0]}")
    return dataset.select_columns(list(columns))


def _datasets() -> ModuleType:
    """The datasets library, imported when it is first needed; its bars are drawn on a terminal only, like ours."""
    import datasets

    if not console.is_terminal:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong comes as an exception too
    return datasets


def _from_file(file: Path) -> "Dataset":
    datasets = _datasets()

    if file.stat().st_size == 0:
        raise InputError(f"{file} is empty: expected at least one text")
    options = {}
    if READERS[file.suffix] == "text":
        options["encoding_errors"] = "replace"
        with file.open("rb") as stream:
            if STORY_SEPARATOR.encode() in stream.read(1 << 20):
                # The library caches by the arguments: without the file's time, a file that has changed gives old texts.
                identity = (file.stat().st_size, file.stat().st_mtime_ns)
                return datasets.Dataset.from_generator(
                    _separated_stories, gen_kwargs={"file": file, "identity": identity}, split="train"
                )
    try:
        dataset = datasets.load_dataset(READERS[file.suffix], data_files={"train": str(file)}, split="train", **options)
        dataset.data.validate(full=True)  # a damaged parquet file may hold strings that are no UTF-8
        return dataset
    except Exception as error:  # what a damaged file makes its readers raise has no bounds
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(
            f"{file} cannot be read as {READERS[file.suffix]} ({cause}): expected a whole file of that format"
        ) from error


def _separated_stories(file: Path, identity: tuple[int, int]) -> Iterator[dict[str, str]]:
    """The stories of an official TinyStories text file, one dictionary each, whatever its size."""
    story: list[str] = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            *ended, rest = line.split(STORY_SEPARATOR)
            for part in ended:
                yield {"text": "".join([*story, part]).strip()}
                story = []
            story.append(rest)
    if last := "".join(story).strip():
        yield {"text": last}


def _from_hub(name: str, split: str) -> "Dataset | None":
    datasets = _datasets()
    from huggingface_hub.errors import HfHubHTTPError

    look_for_hub()
    try:
        return datasets.load_dataset(name, split=split)
    except (ConnectionError, OSError, HfHubHTTPError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InputError(
            f"data.path {name!r} cannot be had from the hub ({type(error).__name__}): check the name and the network, "
            "or give a local folder with train.* and validation.* files, or demo"
        ) from error
    except ValueError as error:
        if "split" in str(error):
            return None
        raise
