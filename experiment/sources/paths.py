"""Names of files as people type them."""

from contextlib import suppress
from pathlib import Path

from experiment.errors import InputError


def user_path(name: str | Path) -> Path:
    """The path of that name, ``~`` expanded; it need not exist.

    Raises:
        InputError: No file can have this name: it is too long, of a user who is not there, or not to be looked at.
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
    """The file of that name, or None where there is none, since ``name`` may as well be a text."""
    try:
        path = user_path(name)
        return path if path.is_file() else None
    except InputError:
        return None


def shortened(text: str, most: int = 60) -> str:
    """The text, or where it is longer its beginning, for a message of one line."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
