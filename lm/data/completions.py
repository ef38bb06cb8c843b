"""The tokens of a source to train on: all of a ``text``, the ``completion`` of a ``prompt``, and in ``messages``
what the assistant says."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experiment.errors import InputError
from experiment.sources.paths import shortened
from lm.data.tokenizer import StoryTokenizer

LAYOUTS = (("text",), ("prompt", "completion"), ("messages",))
Rows = Mapping[str, Sequence[Any]]  # the values of each column


def story_columns(names: Collection[str], where: str) -> Sequence[str]:
    """The columns that stories are made of.

    Args:
        names: All columns.
        where: What to call the source in messages.

    Raises:
        InputError: There are columns of several kinds, or a prompt without its completion.
    """
    found = [layout for layout in LAYOUTS if set(layout) <= set(names)]
    if len(found) > 1:
        kinds = " and ".join(" with ".join(layout) for layout in found)
        raise InputError(f"{where} has columns of {kinds}: expected only one kind; remove or rename the others")
    if not found and len(half := {"prompt", "completion"} & set(names)) == 1:
        (lacking,) = {"prompt", "completion"} - half
        raise InputError(f"{where} has a column {half.pop()!r} and no {lacking!r} (it has {', '.join(names)}): add it")
    if names and not found:
        kinds = "'text', no 'prompt' with its 'completion' and no 'messages'"
        raise InputError(f"{where} has no column {kinds}: it has {', '.join(names)}; rename the column that you mean")
    return found[0] if found else LAYOUTS[0]  # the reader reports files that cannot be read


def encode_stories(
    rows: Rows, tokenizer: StoryTokenizer, where: str
) -> tuple[list[list[int]], list[list[bool]] | None]:
    """The token ids of the non-empty stories, each with what the tokenizer puts before a text and, except for
    conversations, eos; and a mask of the tokens that are trained on, None for all.

    Prompt and completion are tokenized separately, so that the prompt's ids are those that ``predict`` gives the model.

    Raises:
        InputError: A value has the wrong type, a completion is empty, or the tokenizer has no chat template.
    """
    if "messages" in rows:
        if not tokenizer.chat_template:
            raise InputError(f"{where} holds messages, but data.tokenizer has no chat template; use one that has")
        chats = [tokenizer.encode_conversation(_messages(value, where)) for value in rows["messages"]]
        return [ids for ids, _ in chats], [learned for _, learned in chats]
    for column, values in rows.items():
        if odd := [value for value in values if not isinstance(value, str | None)]:
            raise InputError(f"column {column!r} of {where} holds {odd[0]!r}: expected text")
    if "text" in rows:
        texts = [text for text in rows["text"] if text and text.strip()]
        return [[*tokenizer.begins_with, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)], None
    prompts, completions = rows["prompt"], rows["completion"]
    for prompt, completion in zip(prompts, completions, strict=True):
        if prompt is None:
            raise InputError(f"{where} has no prompt for the completion {shortened(str(completion))!r}: add it")
        if not (completion and completion.strip()):
            raise InputError(f"{where} has an empty completion of the prompt {shortened(prompt)!r}: expected text")
    before = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    after = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_continuations(completions)]
    pairs = list(zip(before, after, strict=True))
    return [a + b for a, b in pairs], [[False] * len(a) + [True] * len(b) for a, b in pairs]


def plain_texts(rows: Rows, where: str) -> list[str]:
    """The texts that a tokenizer is trained on.

    Raises:
        InputError: Messages need a chat template, which a trained tokenizer does not have.
    """
    if "messages" in rows:
        raise InputError(f"{where} holds messages: give --data.tokenizer one that has a chat template, not 'train'")
    return [text for parts in zip(*rows.values(), strict=True) if (text := "".join(filter(None, parts)))]


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        messages = None
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise InputError(
            f"column 'messages' of {where} holds {shortened(str(value))!r}: expected a list of objects with role and "
            "content, both text"
        )
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
