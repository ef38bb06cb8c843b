"""What the commands beside lm and classify have in common: their parser, and errors of one line."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from experiment.errors import InputError
from experiment.wording import as_called, reworded


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are of one line, as everywhere: no usage before them.

    Args:
        prog: Such as ``tinylab tell``.
        description: Its first paragraph is shown, or the `whole`.
    """

    def __init__(self, prog: str, description: str | None = None, whole: bool = False, **options: Any) -> None:
        about = as_called(description or "")  # no docstring: `python -OO` has none
        if whole:
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(
            as_called(prog), description=about if whole else about.partition("\n\n")[0], allow_abbrev=False, **options
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one line on stderr: exit code 2 where its input or the disk cannot be used, 130 on Ctrl-C."""
    try:
        yield
    except (InputError, argparse.ArgumentError) as error:
        message = reworded(str(error))
    except OSError as error:  # no space, no permission
        message = f"{error.filename or 'writing'}: {error.strerror}; free space, or choose another folder"
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
