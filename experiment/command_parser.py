"""Shared by the commands other than lm and classify: their parser, and one-line errors."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from experiment.errors import InputError
from experiment.wording import as_called, reworded


class CommandParser(argparse.ArgumentParser):
    """A parser with one-line errors: no usage text before them.

    Args:
        prog: Such as ``tinylab tell``.
        description: Only its first paragraph is shown, unless `whole`.
    """

    def __init__(self, prog: str, description: str | None = None, whole: bool = False, **options: Any) -> None:
        about = as_called(description or "")  # not a docstring: `python -OO` strips those
        if whole:
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(
            as_called(prog), description=about if whole else about.partition("\n\n")[0], allow_abbrev=False, **options
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one line on stderr: exit code 2 if its input or the disk is unusable, 130 on Ctrl-C."""
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
