"""The one error a user is meant to read, and how a command line prints it."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used.

    Its message is one line that names the value, what was expected and the cure. The command line prints it
    on stderr and exits with code 2; any other exception is a bug and keeps its traceback.
    """


def hint(word: str, known: Iterable[str]) -> str:
    """The known word that a mistyped one is near to, or begins, as a question in brackets; nothing where none is."""
    known = list(known)
    near = [name for name in known if word and name.startswith(word)]
    if len(near) != 1:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return f" (did you mean {near[0]}?)" if near else ""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one line on stderr and exit code 2 where its input, or the disk, cannot be used."""
    try:
        yield
    except (InputError, argparse.ArgumentError) as error:
        message = " ".join(str(error).split())
    except OSError as error:  # no space, no permission
        message = f"{error.filename or 'writing'}: {error.strerror}; free space, or give another place"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
