"""Prompts of ``predict``: read from a list or a file, and tokenized in batches."""

import json
import shlex
from collections.abc import Sequence
from itertools import pairwise

from torch.utils.data import Dataset

from experiment.errors import InputError
from experiment.sources.paths import existing_file, repaired, shortened
from experiment.sources.rows import read_given
from lm.data.corpus import Corpus
from lm.data.tokenizer import StoryTokenizer


class PromptBatches(Dataset):
    """``self[indices]`` is {"prompts": texts, "input_ids": a list of ids for each}."""

    def __init__(self, prompts: Sequence[str], tokenizer: StoryTokenizer) -> None:
        self.prompts = list(prompts)
        self.input_ids = [tokenizer.encode_prompt(prompt) for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list]:
        return {"prompts": [self.prompts[i] for i in indices], "input_ids": [self.input_ids[i] for i in indices]}


def flags_to_try(corpus: Corpus, tokenizer: StoryTokenizer) -> str | None:
    """Flags of predict with a short prompt from the corpus, or a story's first words; None for conversations."""
    if tokenizer.chat_template:
        return None
    prompts = [corpus.tokens[: corpus.offsets[1]]]
    if corpus.learned is not None:
        stories = pairwise(corpus.offsets[:21].tolist())
        prompts = [corpus.tokens[begin : begin + corpus.learned[begin:end].argmax()] for begin, end in stories]
    prompt = tokenizer.decode(min(prompts, key=len).tolist())
    if corpus.learned is None:
        prompt = " ".join(prompt.split()[:4])
    return f"--data.prompts {shlex.quote(json.dumps([prompt], ensure_ascii=False))}"


def read_prompts(prompts: list[str] | str | None) -> list[str]:
    """The prompts from a list or a file (.txt, one per line; .json or .jsonl, strings or objects with a ``prompt``; a
    table with a column ``prompt``).

    Raises:
        InputError: there are none, or the file is missing or has other contents.
    """
    if prompts is None:
        raise InputError("data.prompts is not given: expected a list of beginnings, or a file with one per line")
    if not isinstance(prompts, str):
        found, where = list(prompts), "data.prompts"
    else:
        file, where = existing_file(prompts), f"data.prompts {shortened(prompts)!r}"
        if file is None:
            if prompts.lstrip().startswith("[") and not prompts.rstrip().endswith("]"):
                raise InputError(f"{where}: the list does not end; expected a ] after the last prompt")
            as_list = json.dumps([shortened(prompts)], ensure_ascii=False)
            raise InputError(f"{where} is not a file: to give the prompt itself, write it as a list, '{as_list}'")
        found = read_given(file, "prompt", where)
    if odd := [prompt for prompt in found if not isinstance(prompt, str)]:
        raise InputError(f"{where} holds {odd[0]!r}: expected text, or an object with a 'prompt' that is text")
    if not found:
        raise InputError(f"{where} is empty: expected at least one beginning of a story")
    return [repaired(prompt) for prompt in found]
