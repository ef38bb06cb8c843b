"""Sources of text: a hub name, a local folder, a local file, or the built-in ``demo`` corpus.

Both experiments read through ``load_texts``, so that ``--data.path`` means the same everywhere.
"""

import errno
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from experiment.console import console
from experiment.errors import InputError
from experiment.sources.hub import look_for_hub, newest_revision
from experiment.sources.paths import user_path
from experiment.sources.rows import MESSAGES, columns_of, format_of, formats, read_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features

SPLITS = ("train", "validation", "test")
SPLIT_WORDS = {word: word for word in SPLITS} | {"valid": "validation", "val": "validation", "dev": "validation"}
_WORDS = "|".join(SPLIT_WORDS)
# train.jsonl, data/train-00000-of-00002.parquet, train/0000.parquet; or, if there is none, TinyStories-train.txt.
_NAMED = re.compile(rf"(?P<split>{_WORDS})(-(?P<shard>\d+)-of-(?P<shards>\d+)(-\w+)?)?", re.IGNORECASE)
_ENDING = re.compile(rf".*[-_.](?P<split>{_WORDS})", re.IGNORECASE)
# Required columns, or a function that selects them from the available ones and the source's name.
Columns = Sequence[str] | Callable[[Sequence[str], str], Sequence[str]]
READING = 1  # raise it when reading changes, so that the library does not reuse its cache
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def local_files(path: str) -> dict[str, list[Path]] | None:
    """The files of a local source by split, or None if ``path`` is not local (``demo`` or a hub name).

    A folder holds ``train.*``, ``validation.*`` and ``test.*`` (``valid.*``, ``val.*`` and ``dev.*`` are understood),
    directly or in one subfolder, whole or in shards as on the hub (``data/train-00000-of-00002.parquet``),
    or folders of these names with shards of any name. A file is a training split.

    Raises:
        InputError: The path looks local but does not exist, or contains nothing readable; or two files
            are the same split, or a shard is missing.
    """
    if path == "demo":
        return None
    source = user_path(path)
    if source.is_dir():
        files = _files_in(source)
        if "train" not in files:
            raise InputError(f"data.path {path} holds no train.* file: expected train and validation as {formats()}")
        return files
    if source.is_file():
        if format_of(source) is None:
            raise InputError(f"data.path {path} has the unknown extension {source.suffix!r}: expected {formats()}")
        return {"train": [source]}
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or format_of(source) is not None
    if looks_local:
        raise InputError(
            f"data.path {path!r} does not exist: expected a folder, a file, demo, or a hub name such as "
            "roneneldan/TinyStories (stories) or stanfordnlp/imdb (reviews)"
        )
    return None


def _files_in(folder: Path) -> dict[str, list[Path]]:
    inner = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    inner += [file for within in inner if within.is_dir() for file in sorted(within.iterdir())]
    files = [file for file in inner if file.is_file() and not file.name.startswith(".") and format_of(file)]
    found: dict[str, dict[Path, re.Match | None]] = {}
    for pattern in (_NAMED, _ENDING):
        for file in files:
            name = file.name[: file.name.lower().rindex(format_of(file))]
            match = pattern.fullmatch(name)
            word = match["split"] if match else file.parent.name if file.parent != folder else ""
            if split := SPLIT_WORDS.get(word.lower()):
                found.setdefault(split, {})[file] = match
        if "train" in found:
            break
    return {split: _whole(split, matches) for split, matches in found.items()}


def _whole(split: str, matches: dict[Path, re.Match | None]) -> list[Path]:
    """The file of a split, or all its shards, which share a folder, format and total, or fill a folder."""
    files = list(matches)
    totals = [match.groupdict().get("shards") if match else "any" for match in matches.values()]
    numbers = [int(match["shard"]) for match in matches.values() if match and match.groupdict().get("shard")]
    kinds = {(file.parent, format_of(file), total) for file, total in zip(files, totals, strict=True)}
    if len(kinds) > 1 or (len(files) > 1 and totals[0] is None) or len(set(numbers)) < len(numbers):
        raise InputError(
            f"{files[0]} and {files[1]} are both the {split} split: remove or rename one, or give the one that is "
            "meant with data.path"
        )
    if numbers and (missing := set(range(int(totals[0]))) - set(numbers)):
        raise InputError(
            f"{files[0].parent} holds {len(files)} of the {int(totals[0])} shards of {split}, and number "
            f"{min(missing)} is missing: fetch it, or rename the others if they are complete"
        )
    return files


def source_fingerprint(path: str, revision: str | None = None) -> str:
    """Identifies a source without reading it: files by path, size and time, a hub data set by
    its newest revision, else by name."""
    files = local_files(path)
    if files is None:
        return path if path == "demo" else f"{path}@{newest_revision(path, revision)}"
    return json.dumps({split: identities(of_split) for split, of_split in files.items()}, sort_keys=True)


def identities(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    stats = [(file, file.stat()) for file in files]
    return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def load_texts(
    path: str,
    split: str,
    columns: Columns = ("text",),
    demo: Callable[[str], "Dataset | None"] | None = None,
    revision: str | None = None,
) -> "Dataset | None":
    """One split of a source of texts, memory-mapped, with the requested columns.

    Args:
        path: A hub name, a local folder or file, or ``demo``.
        split: ``train``, ``validation`` or ``test``.
        columns: Required columns; others are left out.
        demo: Makes a split of the built-in corpus.
        revision: Branch, tag or commit of a data set of the hub; None for the newest.

    Returns:
        The split, or None if the source does not have it.

    Raises:
        InputError: The path does not exist, the hub cannot be reached, a file is empty or cannot be read, or a
            column is missing.
    """
    if path == "demo" and demo is not None:
        return demo(split)
    files = local_files(path)
    if files is not None:
        return _from_files(files[split], chosen(columns, files[split])) if split in files else None
    dataset = load_from_hub(path, split, revision)
    if dataset is None:
        return None
    columns = columns(dataset.column_names, f"{path} ({split})") if callable(columns) else columns
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise InputError(
            f"{path} ({split}) has no column {missing[0]!r}: it has {', '.join(dataset.column_names)}; "
            "rename the column that you mean"
        )
    if len(dataset) == 0:
        raise InputError(f"{path} ({split}) is empty: expected at least one row with a {columns[0]}")
    return dataset.select_columns(list(columns))


def chosen(columns: Columns, files: Sequence[Path]) -> Sequence[str]:
    """The columns to read of these files."""
    return columns(columns_of(files[0]), str(files[0])) if callable(columns) else columns


def datasets_library() -> ModuleType:
    """The datasets library, imported when it is first needed; its bars are drawn on a terminal only, like ours."""
    import datasets

    if not console.is_terminal:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # problems also raise exceptions
    return datasets


def _from_files(files: list[Path], columns: Sequence[str]) -> "Dataset":
    datasets = datasets_library()
    arguments = {"files": tuple(files), "columns": tuple(columns), "identity": (READING, *identities(files))}
    try:
        return datasets.Dataset.from_generator(
            read_rows, gen_kwargs=arguments, features=row_features(files, columns), split="train"
        )
    except Exception as error:  # the library wraps the reader's exceptions in its own
        if (known := _reading_error(error)) is error:
            raise
        raise known from error


def _reading_error(error: BaseException) -> BaseException:
    """The reader's own InputError if that is the cause; one for a cache that is not writable; else the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return cause
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            import datasets

            return InputError(
                f"{cause.filename or datasets.config.HF_DATASETS_CACHE} cannot be written ({cause.strerror}), where "
                "texts are cached: free space there, or set HF_HOME to a writable folder"
            )
        cause = cause.__cause__ or cause.__context__
    return error


def row_features(files: Sequence[Path], columns: Sequence[str]) -> "Features":
    """The column types that `read_rows` gives; parquet has its own, such as class names."""
    datasets = datasets_library()
    features = dict.fromkeys(columns, datasets.Value("string"))
    if format_of(files[0]) == ".parquet":
        from pyarrow.parquet import read_schema

        try:
            found = datasets.Features.from_arrow_schema(read_schema(files[0]))
        except Exception:  # damaged, which the reader will report
            return datasets.Features(features)
        features |= {column: found[column] for column in columns if column in found and column != MESSAGES}
    return datasets.Features(features)


def load_from_hub(name: str, split: str, revision: str | None, streaming: bool = False) -> Any:
    """A split of a hub data set; None if it lacks that split.

    Raises:
        InputError: It could not be downloaded, or the cache cannot be written.
    """
    datasets = datasets_library()
    from huggingface_hub.errors import HfHubHTTPError

    look_for_hub()
    try:
        return datasets.load_dataset(name, split=split, revision=newest_revision(name, revision), streaming=streaming)
    except Exception as error:
        if isinstance(error, ValueError) and "split" in str(error):
            return None
        if (known := _reading_error(error)) is not error:
            raise known from error
        if isinstance(error, ConnectionError | OSError | HfHubHTTPError | datasets.exceptions.DatasetNotFoundError):
            raise InputError(
                f"data.path {name!r} could not be downloaded from the Hub ({type(error).__name__}): check the name and "
                "the network, or give a local folder with train.* and validation.* files, or demo"
            ) from error
        raise
