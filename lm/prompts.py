"""The beginnings of stories that ``predict`` continues: given as a list or in a file, tokenised as batches."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from experiment.errors import InputError
from lm.tokenizer import StoryTokenizer


class PromptBatches(Dataset):
    """``self[indices]`` is {"prompts": list of str, "input_ids": list of list of int (bos, then tokens)}."""

    def __init__(self, prompts: Sequence[str], tokenizer: StoryTokenizer) -> None:
        self.prompts = list(prompts)
        self.input_ids = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(self.prompts)]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list]:
        return {"prompts": [self.prompts[i] for i in indices], "input_ids": [self.input_ids[i] for i in indices]}


def read_prompts(prompts: list[str] | str | None) -> list[str]:
    """The prompts of a list, or of a file (.txt, one a line; .json or .jsonl, strings or objects with a ``prompt``).

    Raises:
        InputError: there are none, or the file is missing or holds something else.
    """
    if prompts is None:
        raise InputError("data.prompts is not given: expected a list of beginnings, or a file with one a line")
    if not isinstance(prompts, str):
        found, where = list(prompts), "data.prompts"
    else:
        path, where = Path(prompts).expanduser(), f"data.prompts {prompts!r}"
        if not path.is_file():
            as_list = json.dumps([prompts])
            raise InputError(f"{where} is no file: to give the prompt itself, write it as a list, '{as_list}'")
        try:
            text = path.read_text(encoding="utf-8")
            found = list(_prompts_in_json(path, text)) if path.suffix in (".json", ".jsonl") else text.splitlines()
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"{where} cannot be read ({error}): expected text with one prompt a line, or .json or .jsonl "
                "with strings or with objects that have a 'prompt'"
            ) from None
        if path.suffix not in (".json", ".jsonl"):
            found = [line for line in found if line.strip()]
    if odd := [prompt for prompt in found if not isinstance(prompt, str)]:
        raise InputError(f"{where} holds {odd[0]!r}: expected text, or an object with a 'prompt' that is text")
    if not found:
        raise InputError(f"{where} is empty: expected at least one beginning of a story")
    return found


def _prompts_in_json(path: Path, text: str) -> Iterator[Any]:
    lines = (line for line in text.split("\n") if line.strip())  # U+2028 may stand within a string
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    for row in rows:
        yield row["prompt"] if isinstance(row, dict) else row
