"""Names and texts as people type them; files and folders that are written atomically."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiment.errors import InputError


def user_path(name: str | Path) -> Path:
    """The path of that name, ``~`` expanded; it need not exist.

    Raises:
        InputError: No file can have this name: it is too long, of an unknown user, or not accessible.
    """
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, RuntimeError, ValueError) as error:
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"{shortened(str(name))!r} cannot be the name of a file ({cause}): expected a path") from error
    return path


def existing_file(name: str) -> Path | None:
    """The file of that name, or None if there is none, since ``name`` may also be a text."""
    try:
        path = user_path(name)
        return path if path.is_file() else None
    except InputError:
        return None


def texts_of(given: str | Iterable[str]) -> list[str]:
    """A list of texts, from one text or a list.

    Raises:
        TypeError: It is, or holds, something else.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    texts = list(given) if several else [given]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{shortened(repr(given))}: expected a text or a list of texts")
    return texts


def shortened(text: str, most: int = 60) -> str:
    """The text, or its beginning if it is long, for a one-line message."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def write_text(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a kill leaves either the old or the new one.

    Raises:
        InputError: The folder or the disk does not allow it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(file)
    except OSError as error:
        cure = "free space, or choose another folder"
        raise InputError(f"{file} cannot be written ({error.strerror}): {cure}") from error


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def repaired(text: str) -> str:
    """The text as valid UTF-8: U+FFFD replaces a lone UTF-16 surrogate, which JSON allows; and bytes of a command
    line that the locale could not decode are decoded as UTF-8."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cache_root() -> Path:
    """Tinylab's cache folder: $TINYLAB_CACHE, or $XDG_CACHE_HOME/tinylab, or ~/.cache/tinylab."""
    if own := os.environ.get("TINYLAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinylab"


def cached_folder(kind: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` fills for this key, built at most once.

    Several processes may ask at the same time: one builds, under a file lock, the others wait and find it. The
    folder is filled under a temporary name and renamed, so that it is either complete or absent. The key is kept
    in the folder as ``key.json``, for reference.

    Args:
        kind: Subfolder of the cache, such as ``tokens``.
        key: Everything that the content depends on, as JSON can hold it.
        build: Fills the empty folder it is given.

    Raises:
        InputError: The cache folder cannot be written.
    """
    text = json.dumps(key, sort_keys=True)
    target = cache_root() / kind / hashlib.sha256(text.encode()).hexdigest()[:20]
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}): "
            "set TINYLAB_CACHE to a writable folder"
        ) from error
    try:
        if not target.is_dir():  # else another process built it while we waited
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                (partial / "key.json").write_text(text + "\n", encoding="utf-8")
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    finally:
        lock.release()
    return target
