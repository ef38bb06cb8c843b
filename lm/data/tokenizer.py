"""LLaMA-style tokenizers, and the number of bytes of each token.

Everything is one `tokenizers.Tokenizer` (Rust) behind `StoryTokenizer`, wherever it came from: a file that
lm/data/tokenizer_files.py reads, or `lm.data.bpe.train_tokenizer`.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # before any data loader forks, else it warns each time

import numpy as np
from tokenizers import Encoding, Tokenizer, processors

from experiment.errors import InputError
from experiment.sources.paths import repaired, shortened

SPACE = "▁"  # U+2581, the visible space of SentencePiece
BYTES = [f"<0x{value:02X}>" for value in range(256)]
NO_CHARACTER = "\ufdd0"  # never assigned by Unicode and in no piece: its bytes merge with no neighbor
PROBE = 'Once upon a time, there was a little girl.\n"Wow!"  she said <s> 123 naïve 🎉'


class StoryTokenizer:
    """A `tokenizers.Tokenizer` with the ids of its special tokens and the bytes of each token.

    Args:
        backend: the tokenizer; its truncation and padding are switched off.
        bos_id: the id that begins a story.
        eos_id: the id that ends a story.
        pad_id: the padding id; `eos_id` if the tokenizer has none.
        name: what to call it in messages.

    Attributes:
        begins_with: the ids that the tokenizer prepends to every text: bos, or nothing.
        chat_template: turns chat messages into one text (Jinja, as in transformers); None for no chat.

    Raises:
        InputError: it does not reproduce text exactly (BERT's, for example, lower-cases).
    """

    def __init__(
        self, backend: Tokenizer, bos_id: int, eos_id: int, pad_id: int | None = None, name: str = "it"
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" inside a story is text
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        self.chat_template: str | None = None
        whole, text = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
        self.begins_with = whole[: next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)]
        probe = self.encode(PROBE)
        if self.decode(probe) != PROBE or self.text_bytes(probe).sum() != len(PROBE.encode()):
            raise InputError(
                f"tokenizer {name!r} does not reproduce text exactly; use one of the LLaMA or GPT kind, or 'train'"
            )

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id (special tokens included)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that represent no text: unk, bos, eos and other control tokens."""
        special = (i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)
        return frozenset([*special, self.bos_id, self.eos_id])

    @cached_property
    def fingerprint(self) -> str:
        """Identity for cache keys: equal fingerprints mean equal ids for every text."""
        backend = json.loads(self.backend.to_str())
        del backend["post_processor"]  # which adds tokens around a text
        state = f"{json.dumps(backend)} {self.bos_id} {self.eos_id}"
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    @cached_property
    def byte_ids(self) -> list[int] | None:
        """The ids of the 256 bytes of a byte-fallback tokenizer; None for a byte-level one."""
        ids = [self.backend.token_to_id(piece) for piece in BYTES]
        return None if None in ids else ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text only, without bos or eos. Names of special tokens in it are plain text."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, with what the tokenizer prepends to every text; only bos for an empty text."""
        return [*self.begins_with, *self.encode(text)] or [self.bos_id]

    def begin_with_bos(self) -> None:
        """Prepend bos to every prompt, as training does to every story."""
        bos = self.backend.id_to_token(self.bos_id)
        self.backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
        )
        self.begins_with = [self.bos_id]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue others: no space is prepended, so that the ids of both together are those of the
        joined text."""
        mark = NO_CHARACTER if self.prefix_bytes else ""
        skipped = len(self.encode(mark))
        return [ids[skipped:] for ids in self.encode_batch([mark + text for text in texts])]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation up to its next answer. Names of special tokens are special tokens here.

        Args:
            messages: Each with a role, such as user or assistant, and its content.

        Raises:
            InputError: The chat template is invalid, or rejects these messages.
        """
        return self._encode_rendered(self._render(messages, add_generation_prompt=True)[0]).ids

    def encode_conversation(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and a mask of the assistant's: what the chat template has between
        ``{% generation %}`` and ``{% endgeneration %}``; without these, what an assistant message
        adds after the generation prompt.

        Raises:
            InputError: As `encode_chat`; or the assistant says nothing, or its tokens cannot be identified.
        """
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template) is not None
        text, spans = self._render(messages, return_assistant_tokens_mask=marked)
        if not marked:
            spans = []
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = self._render(messages[:i], add_generation_prompt=True)[0]
                    after = self._render(messages[: i + 1])[0]
                    if not (text.startswith(after) and after.startswith(before)):
                        raise InputError(
                            "the tokenizer's chat template does not mark the assistant's tokens: put "
                            "{% generation %} and {% endgeneration %} around them"
                        )
                    spans.append((len(before), len(after)))
        encoded = self._encode_rendered(text)
        learned = [any(a < end and b > begin for begin, end in spans) for a, b in encoded.offsets]
        if not any(learned):
            raise InputError(f"a conversation without assistant text: {shortened(text)!r}; remove it")
        return encoded.ids, learned

    def _render(self, messages: Sequence[dict[str, str]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the spans of the assistant's marked words, if requested."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        options["bos_token"], options["eos_token"] = map(self.backend.id_to_token, (self.bos_id, self.eos_id))
        try:
            texts, spans = render_jinja_template([list(messages)], chat_template=self.chat_template, **options)
        except (TemplateError, TypeError) as error:
            raise InputError(f"the tokenizer's chat template cannot be used ({error}): repair or remove it") from error
        return texts[0], [*spans[0]] if spans else []

    def _encode_rendered(self, text: str) -> Encoding:
        self.backend.encode_special_tokens = False
        try:
            return self.backend.encode(repaired(text), add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        texts = [repaired(text) for text in texts]
        if self.byte_ids is None:  # a byte-level tokenizer: U+2581 is an ordinary character
            return [item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        # The normalizer turns spaces into U+2581, so a real U+2581 would come back as a space. It goes in as a
        # character that no vocabulary has, whose three bytes are then corrected in the ids.
        stand_ins = {i: _absent_from(text) for i, text in enumerate(texts) if SPACE in text}
        if stand_ins:
            texts = [text.replace(SPACE, stand_ins.get(i, SPACE)) for i, text in enumerate(texts)]
        rows = [item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        for i, character in stand_ins.items():
            rows[i] = _replace(rows[i], self._ids_of_bytes(character), self._ids_of_bytes(SPACE))
        return rows

    def _ids_of_bytes(self, text: str) -> list[int]:
        return [self.byte_ids[value] for value in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence: special tokens are skipped, and the space that `encode` prepended is taken
        off. The text of a continuation is `decode(prompt + new)` after `decode(prompt)`."""
        if self.byte_ids is None:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        # The backend drops a whole run of byte tokens if one is not UTF-8, and with it characters of the prompt.
        text = b"".join(self._token_bytes[i] for i in ids)
        return text[text.startswith(b" ") * self.prefix_bytes :].decode(errors="replace")

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of each id of a byte-fallback tokenizer, none for special tokens."""
        result = [b""] * self.vocab_size
        for piece, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i not in self.special_ids:
                result[i] = piece.replace(SPACE, " ").encode()
        for value, i in enumerate(self.byte_ids):
            result[i] = bytes([value])
        return result

    @cached_property
    def bytes_per_token(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of each token within a text, 0 for special tokens. The first
        token of a text has `prefix_bytes` fewer; `text_bytes` subtracts them."""
        if self.byte_ids is not None:
            return np.array([len(piece) for piece in self._token_bytes])
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i not in self.special_ids:  # each character of a byte-level piece is one byte
                sizes[i] = len(piece.encode() if piece in added else piece)
        return sizes

    @cached_property
    def prefix_bytes(self) -> int:
        """1 if the tokenizer puts a space before every text, else 0."""
        return int(self.bytes_per_token[self.encode("a")].sum()) - 1

    def text_bytes(self, ids: Sequence[int]) -> np.ndarray:
        """(len(ids),) int64: bytes of each token of a whole text; they sum to the text's length in UTF-8."""
        sizes = self.bytes_per_token[np.asarray(ids, dtype=np.int64)]
        sizes[:1] -= self.prefix_bytes
        return sizes

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer, which then prepends the same
        tokens to a text as here."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        bos, eos, pad = (self.backend.id_to_token(i) for i in (self.bos_id, self.eos_id, self.pad_id))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
        }
        if "<unk>" in self.backend.get_vocab():
            config["unk_token"] = "<unk>"
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _absent_from(text: str) -> str:
    """A noncharacter (U+FDD0 to U+FDEF are never assigned) that does not occur in the text."""
    return next(character for character in map(chr, range(0xFDD0, 0xFDF0)) if character not in text)


def _replace(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    result: list[int] = []
    while len(result) < len(ids):
        here = len(result)
        result += new if ids[here : here + len(old)] == old else ids[here : here + 1]
    return result
