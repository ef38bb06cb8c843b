"""Reads and writes the tokenizer of a GGUF file; also opens the file for the model's weights."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from experiment.errors import InputError
from experiment.extras import require
from lm.data.bpe import from_pieces, piece_scores
from lm.data.tokenizer import StoryTokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # kinds of tokens


_LLAMA3_WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def gguf_package() -> Any:
    require("gguf", "gguf")
    return import_module("gguf")


def add_tokenizer(writer: "GGUFWriter", tokenizer: StoryTokenizer, vocab_size: int) -> None:
    backend = tokenizer.backend
    added = {i: token.special for i, token in backend.get_added_tokens_decoder().items()}
    tokens = [backend.id_to_token(i) or f"<unused {i}>" for i in range(vocab_size)]
    kinds = [_NORMAL if backend.id_to_token(i) is not None else _UNUSED for i in range(vocab_size)]
    for i, special in added.items():
        kinds[i] = _CONTROL if special else _USER_DEFINED
    if tokenizer.byte_ids is not None:
        for i in tokenizer.byte_ids:
            kinds[i] = _BYTE
        if tokenizer.special_ids and (unknown := backend.token_to_id("<unk>")) is not None:
            kinds[unknown] = _UNKNOWN
            writer.add_unk_token_id(unknown)
        scores = piece_scores(tokenizer)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([scores.get(token, -float(len(scores))) for token in tokens])
        writer.add_add_space_prefix(bool(tokenizer.prefix_bytes))
    else:
        description = json.loads(backend.to_str())
        pre = next((name for name, words in _WORDS.items() if _same(words, description["pre_tokenizer"])), None)
        if pre is None or description["normalizer"] is not None or description["model"]["type"] != "BPE":
            raise InputError(
                "llama.cpp does not support how this tokenizer splits words: it must be a byte-fallback BPE, or a "
                f"byte-level one like {', '.join(_WORDS)}; train with tokenizer 'train', or export to Hugging Face"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        merges = description["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_add_bos_token(bool(tokenizer.begins_with))
    writer.add_add_eos_token(False)


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# How byte-level tokenizers split words, under llama.cpp's names.
_WORDS = {
    "gpt-2": _byte_level(True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"), _byte_level(False)]),
}


def _same(words: pre_tokenizers.PreTokenizer, description: dict[str, Any] | None) -> bool:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = words
    described = json.dumps(description).replace('"trim_offsets": false', '"trim_offsets": true')  # of no effect on ids
    return json.dumps(json.loads(backend.to_str())["pre_tokenizer"]) == described


def read_gguf_tokenizer(path: str | Path) -> StoryTokenizer:
    """The tokenizer of a GGUF file; errors as in `from_gguf`."""
    return read_tokenizer(open_gguf(Path(path)), Path(path))


def open_gguf(path: Path) -> "GGUFReader":
    gguf_package()
    from experiment.compat.gguf import BoundedReader

    try:
        return BoundedReader(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a GGUF file") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        cause = " ".join(str(error).split())
        if found := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", cause):
            raise InputError(f"{path}: quantization {found[1]} is unknown; use the file in f32, f16 or q8_0") from None
        raise InputError(f"{path} is not a complete GGUF file ({cause}); copy it again") from None


def read_field(reader: "GGUFReader", path: Path, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
    field = reader.get_field(name)
    try:
        value = default if field is None else field.contents()
    except (ValueError, IndexError, TypeError):  # no UTF-8
        value = None
    if value is None or not isinstance(value, kinds):
        raise InputError(f"{path}: {name} is {'missing' if field is None else 'damaged'}; copy the file again")
    return value


def read_tokenizer(reader: "GGUFReader", path: Path) -> StoryTokenizer:
    def field(name: str, kinds: Any, default: Any = None) -> Any:
        return read_field(reader, path, f"tokenizer.ggml.{name}", kinds, default)

    model, tokens = field("model", str), field("tokens", list)
    eos_id = field("eos_token_id", int)
    bos_id, pad_id = field("bos_token_id", int, eos_id), field("padding_token_id", int, eos_id)
    kinds = field("token_type", list, [_NORMAL] * len(tokens))
    if len(kinds) != len(tokens) or not all(0 <= i < len(tokens) for i in (bos_id, eos_id, pad_id)):
        raise InputError(f"{path}: the tokenizer's lists or ids do not agree; copy the file again")
    # Other kinds of tokens, such as chat tokens, are not text either.
    special = [i for i, kind in enumerate(kinds) if kind not in (_NORMAL, _BYTE)]
    if model == "llama":
        if not field("add_space_prefix", bool, True):
            raise InputError(f"{path}: tokenizer.ggml.add_space_prefix false is not supported; import another model")
        scores = field("scores", list)
        if len(scores) != len(tokens) or 0 not in special:
            raise InputError(f"{path}: the tokenizer's scores or its unknown token are missing; copy the file again")
        tokenizer = from_pieces(tokens, scores, bos_id, eos_id, special, str(path), field("add_bos_token", bool, True))
        tokenizer.chat_template = read_field(reader, path, "tokenizer.chat_template", str, "") or None
        return tokenizer
    if model != "gpt2":
        raise InputError(f"{path}: tokenizer {model!r}; only 'llama' and 'gpt2' can be imported")
    pre = field("pre", str, "gpt-2")
    if pre not in _WORDS:
        raise InputError(f"{path}: tokenizer.ggml.pre {pre!r}; supported are {', '.join(_WORDS)}: import another model")
    merges = [tuple(merge.split(" ")) for merge in field("merges", list)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust library raises plain Exception
        raise InputError(f"{path}: its tokenizer is damaged ({error}); copy the file again") from None
    backend.pre_tokenizer, backend.decoder = _WORDS[pre], decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    tokenizer = StoryTokenizer(backend, bos_id, eos_id, pad_id, str(path))
    tokenizer.chat_template = read_field(reader, path, "tokenizer.chat_template", str, "") or None
    if field("add_bos_token", bool, False):
        tokenizer.begin_with_bos()
    return tokenizer
