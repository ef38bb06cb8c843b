"""The one console that everything is printed through."""

import io
import locale
import sys
from contextlib import suppress

from rich.console import Console

# Text printed past a live bar would tear it, so nothing is printed past this. It writes to standard output, and draws
# no bars where that is a pipe or a file. Brackets and colons in paths and texts are no markup: styles are arguments.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def expect_any_text() -> None:
    """Files are UTF-8 whatever the locale, those of libraries too; what a terminal cannot show becomes a question mark.

    Without it a character that the locale lacks would end a run.
    """
    if locale.getencoding().lower().replace("-", "") != "utf8":
        with suppress(locale.Error):  # Windows and old systems have none; our own files name their encoding
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
