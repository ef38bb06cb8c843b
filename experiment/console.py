"""The console that all output goes through."""

import io
import locale
import sys
from contextlib import suppress

from rich.console import Console

# Text that bypasses a live bar would break it, so all output goes through this. It writes to standard output, and draws
# no bars into a pipe or a file. Brackets and colons in paths and texts are not markup: styles are arguments.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def expect_any_text() -> None:
    """Use UTF-8 for files in any locale, in libraries too; characters a terminal cannot show become question marks.

    Otherwise a character that the locale lacks would end a run.
    """
    if locale.getencoding().lower().replace("-", "") != "utf8":
        with suppress(locale.Error):  # Windows and old systems have none; our own files name their encoding
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
