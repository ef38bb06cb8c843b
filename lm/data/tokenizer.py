"""Tokenizers of the LLaMA kind: make one of pieces, train one, and know how many bytes each token stands for.

Everything is one `tokenizers.Tokenizer` (Rust) behind `StoryTokenizer`, wherever it came from: one of the files that
lm/data/tokenizer_files.py reads, or `train_tokenizer`. A trained one is laid out as LLaMA's: <unk> 0, <s> 1,
</s> 2, the 256 bytes <0x00> ... <0xFF> at 3 to 258, then the pieces, in the order in which they were found.
Text is encoded whole, with a space put before it, and what no piece covers falls back to its UTF-8 bytes, so that
any text comes back unchanged.

SentencePiece and llama2.c join, again and again, the adjacent pair whose union has the highest score. A `tokenizers`
BPE has ranked pairs instead; `_merges` ranks every split of every piece by the piece's score, which gives the same
ids. For a trained tokenizer this needs one more thing: the training splits words by a rule that looks at two
neighbouring characters only (`_WORDS`), so no piece spans such a border, and no merge of the whole text can either.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # before any fork of a data loader, or it warns each time

import numpy as np
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from experiment.errors import InputError
from experiment.sources.paths import shortened
from experiment.sources.rows import repaired

SPACE = "▁"  # U+2581, the visible space of SentencePiece
BYTES = [f"<0x{value:02X}>" for value in range(256)]
NO_CHARACTER = "\ufdd0"  # Unicode assigns it never, no piece holds it: its bytes join no neighbour
SPECIALS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2
# Letters with a space before them, other marks with a space before them, single digits, single spaces. Controls,
# newlines and other white space become bytes.
_WORDS = rf"{SPACE}?[\p{{L}}\p{{M}}]+|{SPACE}?[^\p{{L}}\p{{M}}\p{{N}}\s\p{{C}}{SPACE}]+|\p{{N}}|{SPACE}"
PROBE = 'Once upon a time, there was a little girl.\n"Wow!"  she said <s> 123 naïve 🎉'


class StoryTokenizer:
    """A `tokenizers.Tokenizer` with the ids of its special tokens and the bytes of each token.

    Args:
        backend: the tokenizer; its truncation and padding are switched off.
        bos_id: the id that begins a story.
        eos_id: the id that ends a story.
        pad_id: the id that fills up a batch; `eos_id` where the tokenizer has none.
        name: what to call it in messages.

    Attributes:
        begins_with: the ids that the tokenizer puts before every text: bos, or nothing.
        chat_template: how the messages of a chat become one text (Jinja, as transformers has it); None for no chat.

    Raises:
        InputError: where it does not give text back unchanged (as BERT's, which lower-cases, does not).
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
                f"tokenizer {name!r} does not give text back unchanged; take one of the LLaMA or GPT kind, or 'train'"
            )

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id (special tokens included)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that stand for no text: unk, bos, eos and other control tokens."""
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
        """Ids of the text alone, without bos or eos. Names of special tokens in it are plain text."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a beginning as the model shall see it: with what the tokenizer puts before every text; bos alone for
        no text."""
        return [*self.begins_with, *self.encode(text)] or [self.bos_id]

    def begin_with_bos(self) -> None:
        """Put bos before every prompt, as training puts it before every story."""
        bos = self.backend.id_to_token(self.bos_id)
        self.backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self.bos_id)]
        )
        self.begins_with = [self.bos_id]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that go on after others: no space is put before them, so that the ids of both are those of a
        text that is the two joined."""
        mark = NO_CHARACTER if self.prefix_bytes else ""
        skipped = len(self.encode(mark))
        return [ids[skipped:] for ids in self.encode_batch([mark + text for text in texts])]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation, up to where its next answer begins. Here names of special tokens are special tokens.

        Args:
            messages: Each with a role, such as user or assistant, and its content.

        Raises:
            InputError: The chat template is none, or does not take these messages.
        """
        return self._encode_rendered(self._render(messages, add_generation_prompt=True)[0]).ids

    def encode_conversation(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them the assistant says: what the chat template has between
        ``{% generation %}`` and ``{% endgeneration %}``; where it has none of these, what a message of the assistant
        adds to the text that ends where its answer shall begin.

        Raises:
            InputError: As `encode_chat`; or the assistant says nothing, or what it says cannot be told.
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
                            "the tokenizer's chat template does not tell which tokens the assistant says: put "
                            "{% generation %} and {% endgeneration %} around them"
                        )
                    spans.append((len(before), len(after)))
        encoded = self._encode_rendered(text)
        learned = [any(a < end and b > begin for begin, end in spans) for a, b in encoded.offsets]
        if not any(learned):
            raise InputError(f"a conversation without a word of the assistant: {shortened(text)!r}; remove it")
        return encoded.ids, learned

    def _render(self, messages: Sequence[dict[str, str]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it the marked words of the assistant are, if they are asked for."""
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
        if self.byte_ids is None:  # a byte-level tokenizer: the visible space is a character like any other
            return [item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        # The normalizer turns spaces into U+2581, so a real U+2581 would come back as a space. It goes in as a
        # character that no vocabulary holds, and that character's three bytes are put right in the ids.
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
        """The text of a whole sequence: special tokens are skipped, and the space that `encode` put first is taken
        off. The text of a continuation is `decode(prompt + new)` after `decode(prompt)`."""
        if self.byte_ids is None:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        # The backend gives up a whole run of byte tokens where one of them is no UTF-8, so that a model's slip would
        # eat the characters of the prompt before it.
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
        """(vocab_size,) int64: UTF-8 bytes of each token in the middle of a text, 0 for special tokens. The first
        token of a text stands for `prefix_bytes` fewer; `text_bytes` takes them off."""
        byte_level = "ByteLevel" in json.dumps(json.loads(self.backend.to_str())["decoder"])
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        byte_pieces = frozenset(BYTES)
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i in self.special_ids:
                continue
            if byte_level and piece not in added:
                sizes[i] = len(piece)  # each character of a byte-level piece is one byte
            else:
                sizes[i] = 1 if piece in byte_pieces else len(piece.replace(SPACE, " ").encode())
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
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads; there, the same is
        put before a text as here."""
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
    """A noncharacter (U+FDD0 to U+FDEF are never assigned) that the text does not hold."""
    return next(character for character in map(chr, range(0xFDD0, 0xFDF0)) if character not in text)


def _replace(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    result: list[int] = []
    while len(result) < len(ids):
        here = len(result)
        result += new if ids[here : here + len(old)] == old else ids[here : here + 1]
    return result


def from_pieces(
    pieces: Sequence[bytes | str],
    scores: Sequence[float],
    bos_id: int = 1,
    eos_id: int = 2,
    control_ids: Collection[int] = (0, 1, 2),
    name: str = "it",
    adds_bos: bool = True,
) -> StoryTokenizer:
    """The tokenizer that joins, greedily, the adjacent pair whose union has the highest score, as SentencePiece's BPE
    and llama2.c do.

    Args:
        pieces: the vocabulary in the order of its ids; the space is " " or U+2581, a byte is "<0x41>".
        scores: a score for each piece; those of control tokens and bytes have no meaning.
        bos_id: the id that begins a text.
        eos_id: the id that ends it.
        control_ids: the tokens that stand for no text; id 0 must be among them, it is the unknown token.
        name: what to call it in messages.
        adds_bos: whether it puts bos before every text.

    Raises:
        InputError: pieces that are not UTF-8, two that are equal, one of the 256 bytes missing.
    """
    try:
        texts = [piece if isinstance(piece, str) else piece.decode() for piece in pieces]
    except UnicodeDecodeError as error:
        raise InputError(f"tokenizer {name!r} holds a piece that is not UTF-8 ({error.object!r})") from None
    texts = [text.strip("\n") if i in control_ids else text.replace(" ", SPACE) for i, text in enumerate(texts)]
    vocab = {text: i for i, text in enumerate(texts)}
    if len(vocab) < len(texts):
        double = next(text for i, text in enumerate(texts) if vocab[text] != i)
        raise InputError(f"tokenizer {name!r} holds the piece {double!r} twice")
    if missing := [piece for piece in BYTES if piece not in vocab]:
        raise InputError(f"tokenizer {name!r} lacks {missing[0]}, so it cannot take any text; use another, or 'train'")
    outside = {*control_ids, *(vocab[piece] for piece in BYTES)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores, outside),
            unk_token=texts[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens([AddedToken(texts[i], special=True, normalized=False) for i in sorted(control_ids)])
    tokenizer = StoryTokenizer(backend, bos_id, eos_id, name=name)
    if adds_bos:
        tokenizer.begin_with_bos()
    return tokenizer


def _merges(vocab: dict[str, int], scores: Sequence[float], outside: set[int]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, best score first; ties as in transformers' converter."""
    merges = []
    for piece, i in vocab.items():
        if i in outside:
            continue
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        splits = [(vocab[a], vocab[b]) for a, b in splits if a in vocab and b in vocab]
        merges += [(-scores[i], i, left, right) for left, right in splits if not {left, right} & outside]
    pieces = list(vocab)
    return [(pieces[left], pieces[right]) for _, _, left, right in sorted(merges)]


def piece_scores(tokenizer: StoryTokenizer) -> dict[str, float]:
    """Scores by which the tokenizer's merges come in their order; what no merge makes (characters, bytes) has none."""
    scores: dict[str, float] = {}
    for left, right in json.loads(tokenizer.backend.to_str())["model"]["merges"]:
        scores.setdefault(left + right, -float(len(scores)))
    return scores


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> StoryTokenizer:
    """A byte-fallback BPE (Sennrich et al. 2016, arXiv:1508.07909) of `vocab_size` tokens, LLaMA's layout;
    of fewer where the texts yield no more.

    A piece never crosses a word and never mixes letters, digits and other marks. Characters beyond the most frequent
    (half of the pieces at most) are left to their bytes.

    Raises:
        InputError: a vocab_size that is too small for the bytes.
    """
    fixed = SPECIALS + BYTES
    if vocab_size <= len(fixed):
        raise InputError(f"vocab_size {vocab_size}: a tokenizer needs at least {len(fixed) + 1}; raise vocab_size")
    trainee = Tokenizer(models.BPE(unk_token="<unk>"))
    trainee.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trainee.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=fixed,
        limit_alphabet=(vocab_size - len(fixed)) // 2,
        show_progress=False,  # who gives the texts shows how far they are
    )
    trainee.train_from_iterator(texts, trainer)
    vocab = trainee.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    return from_pieces(pieces, [min(0.0, len(fixed) - i) for i in range(len(pieces))], name="train")
