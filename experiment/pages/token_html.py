"""Renders tokens as colored spans with hover cards; all text is escaped.

Our own, since Gradio's HighlightedText has neither cards nor a way to show text that was not read."""

import html
import json
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One line of a card: a name, a bar for a share in [0, 1], its numbers, and whether it is the chosen one."""

    name: str
    share: float
    figures: str
    taken: bool = False


def escaped(text: str) -> str:
    """Escape text for HTML, Gradio's templates, and bare carriage returns."""
    return html.escape(text).translate({ord(character): f"&#{ord(character)};" for character in "{}$`\r"})


def word(text: str, tone: str, strength: float, title: str, rows: Sequence[Row] = ()) -> str:
    """A word highlighted in its tone (rare, for or against) with `strength` in [0, 1], with its card.

    The space before it is not highlighted.
    """
    card = json.dumps({"title": title, "rows": rows}, ensure_ascii=False, separators=(",", ":"))
    space = text[: len(text) - len(text.lstrip())] if text.strip() else ""
    return (
        f'{space}<span class="word {tone}" style="--strength: {strength:.3f}" data-card="{escaped(card)}">'
        f"{escaped(text.removeprefix(space))}</span>"
    )


def message(text: str) -> str:
    """A message shown instead of an answer."""
    return f'<p class="message" role="alert">{escaped(text)}</p>'
