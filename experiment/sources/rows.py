"""The rows of data files: parquet, JSON, JSON lines, CSV and text, compressed or not.

Text is UTF-8 in any locale, or UTF-16 if it has a BOM. Invalid bytes are replaced: one character
must not end a run.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any, Literal, TextIO

from experiment.console import console
from experiment.errors import InputError
from experiment.sources.paths import repaired

END_MARKER = "<|endoftext|>"  # separates the stories in the official TinyStories text files
LABEL = "label"  # the only column that may contain numbers
MESSAGES = "messages"  # the only column that may contain lists, which become JSON
COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
Row = dict[str, Any]
Layout = Literal["end markers", "blank lines", "one text"]


def format_of(file: Path) -> str | None:
    """The extension that decides how to read a file, such as ``.jsonl`` of ``train.jsonl.gz``; None if unknown."""
    ending = Path(file.stem).suffix if file.suffix.lower() in COMPRESSIONS else file.suffix
    return ending.lower() if ending.lower() in _READERS else None


def formats() -> str:
    return f"{', '.join(_READERS)}, each also with {', '.join(COMPRESSIONS)}"


def columns_of(file: Path) -> list[str]:
    """The columns of a file's first row; none if it cannot be read, which `read_rows` will report."""
    try:
        return list(next(_READERS[format_of(file)](file, [""]), (0, {}))[1])
    except Exception:
        return []


def read_rows(files: Sequence[Path], columns: Sequence[str], identity: Any = None) -> Iterator[Row]:
    """These columns of every row of the files. Texts and labels are str, or None if missing.

    Args:
        files: Files of a format that `format_of` knows.
        columns: All must be in the first row of each file, one in each row.
        identity: Changes when a file changes, for a cache that sees only the arguments.

    Raises:
        InputError: A file is damaged, lacks a column, or contains something other than text.
    """
    empty = True
    for file in files:
        replaced = 0
        try:
            for row in _checked(_READERS[format_of(file)](file, columns), file, columns):
                empty = False
                replaced += sum(text.count("\ufffd") for text in row.values() if isinstance(text, str))
                yield row
            if replaced and not _is_utf8(file):
                what = "1 character was" if replaced == 1 else f"{replaced:,} characters were"
                console.print(f"note: {file} is not UTF-8: {what} replaced by \ufffd; save it as UTF-8")
        except InputError:
            raise
        except Exception as error:  # readers can raise anything on a damaged file
            cause = " ".join(str(error).split())[:200]
            raise InputError(
                f"{file} cannot be read as {format_of(file)[1:]} ({cause}): expected a whole file of that format"
            ) from error
    if empty:
        raise InputError(f"{files[0]} is empty: expected at least one row with a {columns[0]}")


def _checked(rows: Iterator[tuple[int, Row]], file: Path, columns: Sequence[str]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        return
    if missing := [column for column in columns if column not in first[1]]:
        if format_of(file) == ".txt":
            raise InputError(
                f"{file} has no {missing[0]}, since it is plain text: expected a CSV or JSON lines with the columns "
                f"{' and '.join(columns)}"
            )
        raise InputError(
            f"{file} has no column {missing[0]!r}: it has {', '.join(map(str, first[1]))}; rename the one you mean"
        )
    for place, row in chain([first], rows):
        values = {column: row.get(column) for column in columns}
        if row and not row.keys() & values.keys():
            raise InputError(
                f"row {place} of {file} has no column {columns[0]!r}, as the first has: it has "
                f"{', '.join(map(str, row))}; expected the same columns in every row"
            )
        for column, value in values.items():
            if column == MESSAGES and isinstance(value, list):
                value = json.dumps(value, ensure_ascii=False, default=str)
            if isinstance(value, str):
                values[column] = repaired(value)
            elif value is not None and column != LABEL:
                raise InputError(f"column {column!r} of {file} holds {value!r} (row {place}): expected text")
        yield values


def read_given(file: Path, column: str, where: str) -> list[str]:
    """The texts of a hand-written file: one per line unless it is a table; blank lines are skipped. JSON may
    hold strings rather than objects with the column.

    Raises:
        InputError: The file cannot be read, or contains something else; the message begins with ``where``.
    """
    try:
        if format_of(file) in (".json", ".jsonl"):
            rows = [row.get(column, row) if isinstance(row, dict) else row for _, row in _json_values(file)]
        elif format_of(file) in (None, ".txt"):
            with open_text(file) as lines:
                rows = [line.rstrip("\n") for line in lines if line.strip()]
        else:
            rows = [row[column] for row in read_rows([file], [column])]
    except (ValueError, OSError, EOFError) as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where} cannot be read ({cause}): expected text with one {column} per line, or JSON strings, or a table "
            f"with a column {column!r}"
        ) from error
    if odd := [row for row in rows if not isinstance(row, str)]:
        raise InputError(f"{where} holds {odd[0]!r}: expected text, or an object with a {column!r} that is text")
    return [repaired(row) for row in rows]


def _is_utf8(file: Path) -> bool:
    """Whether the bytes of a text file are valid; else a U+FFFD in its text replaces others."""
    if format_of(file) == ".parquet":
        return True
    try:
        with open_text(file, errors="strict") as lines:
            return all(True for _ in lines)
    except UnicodeDecodeError:
        return False


@contextmanager
def open_text(file: Path, newline: str | None = None, errors: str = "replace") -> Iterator[TextIO]:
    """The text of a file, uncompressed and decoded."""
    opener = COMPRESSIONS.get(file.suffix.lower(), lambda file: file.open("rb"))
    with opener(file) as raw, io.BufferedReader(raw) as stream:
        utf16 = stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with io.TextIOWrapper(stream, "utf-16" if utf16 else "utf-8-sig", errors=errors, newline=newline) as text:
            yield text


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    from pyarrow.parquet import ParquetFile

    opener = COMPRESSIONS.get(file.suffix.lower(), lambda file: file.open("rb"))
    with opener(file) as stream, ParquetFile(stream) as table:
        if set(columns) - set(names := table.schema_arrow.names):
            yield 1, dict.fromkeys(names)
            return
        batches = table.iter_batches(1000, columns=list(columns))
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1)


def _json(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    for place, row in _json_values(file):
        if not isinstance(row, dict):
            raise ValueError(f"row {place} is {json.dumps(row)[:40]}: expected an object")
        if isinstance(row.get(LABEL), int | float):  # a column has one type; numbers, booleans and words may be mixed
            row[LABEL] = json.dumps(row[LABEL])
        yield place, row


def _json_values(file: Path) -> Iterator[tuple[int, Any]]:
    """The values of the lines with their numbers, or the items of the single list."""
    with open_text(file) as lines:
        filled = ((place, line) for place, line in enumerate(lines, start=1) if line.strip())
        first = next(filled, (0, ""))
        if first[1].lstrip().startswith("["):
            yield from enumerate(json.loads(first[1] + lines.read()), start=1)
        elif first[1]:
            yield from ((place, _parsed(line, place)) for place, line in chain([first], filled))


def _parsed(line: str, place: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {place}: {error}") from None


def _csv(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(sys.maxsize)
    with open_text(file, newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        for mark, name in ((";", "semicolons"), ("\t", "tabs")):
            if len(rows.fieldnames or ()) == 1 and mark in rows.fieldnames[0]:
                raise InputError(f"{file} looks separated by {name}: save it with commas, or as JSON lines")
        for row in rows:
            if None in row:
                fields = len(row) - 1 + len(row[None])
                raise ValueError(
                    f"line {rows.line_num} has {fields} fields, the header {len(rows.fieldnames)}; "
                    "quote a text that contains a comma"
                )
            yield rows.line_num, row


def text_layout(file: Path) -> Layout:
    """The separator of the texts in a text file."""
    layout, filled, gap = "one text", False, False
    with open_text(file) as lines:
        for line in lines:
            if END_MARKER in line:
                return "end markers"
            if line.strip():
                layout, filled, gap = "blank lines" if gap else layout, True, gap
            else:
                gap = filled
    return layout


def layout_note(files: Sequence[Path]) -> str:
    """The assumptions about text files without end markers."""
    notes = {
        "blank lines": "a blank line ends a text",
        "one text": f"read as one text, since it has neither {END_MARKER} nor blank lines; for one text per line, "
        "use JSON lines",
    }
    layouts = {file: text_layout(file) for file in files if format_of(file) == ".txt"}
    return "; ".join(f"{file.name}: {notes[layout]}" for file, layout in layouts.items() if layout in notes)


def _text(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    layout = text_layout(file)
    with open_text(file) as lines:
        if layout == "end markers":
            texts = _marked(lines)
        elif layout == "blank lines":
            texts = ("".join(block) for filled, block in groupby(lines, lambda line: bool(line.strip())) if filled)
        else:
            texts = iter([lines.read()])
        for place, text in enumerate(texts, start=1):
            if text := text.strip():
                yield place, {"text": text}


def _marked(lines: TextIO) -> Iterator[str]:
    story: list[str] = []
    for line in lines:
        *ended, rest = line.split(END_MARKER)
        for part in ended:
            yield "".join([*story, part])
            story = []
        story.append(rest)
    yield "".join(story)


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[tuple[int, Row]]]] = {
    ".parquet": _parquet,
    ".json": _json,
    ".jsonl": _json,
    ".csv": _csv,
    ".txt": _text,
}
