"""Coloured words on a page, each with a card that unfolds where one points at it; HTML that no text breaks.

By hand, since Gradio's HighlightedText has neither cards nor a place for text that was not read."""

import html
import json
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One line of a card: a name, a bar of a share in [0, 1], its figures, and whether it is the one that was taken."""

    name: str
    share: float
    figures: str
    taken: bool = False


def escaped(text: str) -> str:
    """Text as HTML. Gradio reads what it shows as a template, and HTML a bare return as a line's end."""
    return html.escape(text).translate({ord(character): f"&#{ord(character)};" for character in "{}$`\r"})


def word(text: str, tone: str, strength: float, title: str, rows: Sequence[Row] = ()) -> str:
    """A word on a ground of its tone (rare, for or against), as strong as `strength` in [0, 1], with its card.

    The space before it stays without a ground.
    """
    card = json.dumps({"title": title, "rows": rows}, ensure_ascii=False, separators=(",", ":"))
    space = text[: len(text) - len(text.lstrip())] if text.strip() else ""
    return (
        f'{space}<span class="word {tone}" style="--strength: {strength:.3f}" data-card="{escaped(card)}">'
        f"{escaped(text.removeprefix(space))}</span>"
    )


def message(text: str) -> str:
    """What stands in place of an answer that cannot be given."""
    return f'<p class="message" role="alert">{escaped(text)}</p>'
