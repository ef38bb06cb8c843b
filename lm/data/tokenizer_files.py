"""Reads and writes tokenizers: hub, tokenizer.json, SentencePiece .model, llama2.c .bin, GGUF."""

import json
import struct
from pathlib import Path

from tokenizers import Tokenizer

from experiment.errors import InputError
from experiment.sources.hub import look_for_hub
from experiment.sources.paths import user_path
from lm.data.bpe import SPECIALS, from_pieces, piece_scores
from lm.data.gguf_tokenizer import read_gguf_tokenizer
from lm.data.tokenizer import PROBE, SPACE, StoryTokenizer

_KINDS = (
    "a hub name, a folder with tokenizer.json, or a file: tokenizer.json, SentencePiece .model, llama2.c .bin, .gguf"
)


def load_tokenizer(name: str | Path) -> StoryTokenizer:
    """A tokenizer by its hub name, folder or file (tokenizer.json, SentencePiece .model, llama2.c .bin).

    Raises:
        InputError: it does not exist, is not a tokenizer, or has no end-of-text token.
    """
    name = str(name)
    path = user_path(name)
    if path.is_dir():
        files = [path / file for file in ("tokenizer.json", "tokenizer.model", "tokenizer.bin")]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise InputError(f"tokenizer {name!r}: the folder holds no tokenizer.json; expected {_KINDS}")
    elif not path.exists():
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix in _READERS
        if looks_local:
            raise InputError(f"tokenizer {name!r} does not exist; expected {_KINDS}, or 'train'")
        path = _from_hub(name)
    if path.suffix not in _READERS:
        raise InputError(f"{name!r} is not a tokenizer; expected {_KINDS}")
    return _READERS[path.suffix](path, name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except (OSError, ValueError):  # no such file, name or network: all hub errors derive from these
            return None

    look_for_hub()
    path = fetch("tokenizer.json") or fetch("tokenizer.model")
    if path is None:
        raise InputError(
            f"tokenizer {name!r} is not a local path and could not be downloaded; check the name and the network, "
            "or pass a local folder, or 'train'"
        )
    fetch("tokenizer_config.json")  # if there is one, it is next to the tokenizer and is read there
    return path


def _read_json(path: Path, name: str) -> StoryTokenizer:
    try:
        backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust reader raises plain Exception
        raise InputError(f"tokenizer {name!r}: {path.name} is not a tokenizer ({error}); expected {_KINDS}") from None
    config = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (beside := path.with_name(file)).is_file():
            try:
                config |= json.loads(beside.read_text(encoding="utf-8"))
            except (ValueError, TypeError):
                raise InputError(f"tokenizer {name!r}: {file} is not a JSON object; repair or remove it") from None

    def special(role: str, *usual: str) -> int | None:
        named = config.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        candidates = [named] if isinstance(named, str) else usual
        return next((i for token in candidates if (i := backend.token_to_id(token)) is not None), None)

    eos_id = special("eos", "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
    if eos_id is None:
        raise InputError(f"tokenizer {name!r} has no end-of-text token; set eos_token in its tokenizer_config.json")
    bos_id = special("bos", "<s>", "<|begin_of_text|>", "<bos>")
    tokenizer = StoryTokenizer(backend, eos_id if bos_id is None else bos_id, eos_id, special("pad", "<pad>"), name)
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name, as older transformers stored them
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}.get("default")
    if (beside := path.with_name("chat_template.jinja")).is_file():
        template = beside.read_text(encoding="utf-8", errors="replace")
    tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def _read_sentencepiece(path: Path, name: str) -> StoryTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
        ids = range(model.vocab_size())
        pieces = [model.id_to_piece(i) for i in ids]
    except (OSError, RuntimeError, UnicodeDecodeError):
        raise InputError(f"tokenizer {name!r} is not a SentencePiece model; expected {_KINDS}") from None
    if model.eos_id() < 0:
        raise InputError(f"tokenizer {name!r} has no end-of-text token; use one that has one, or 'train'")
    tokenizer = from_pieces(
        pieces,
        [model.get_score(i) for i in ids],
        model.eos_id() if model.bos_id() < 0 else model.bos_id(),
        model.eos_id(),
        [i for i in ids if model.is_control(i) or model.is_unknown(i)],
        name,
    )
    # Unigram models and models that normalize text fail here.
    if model.encode(PROBE) != tokenizer.encode(PROBE):
        raise InputError(f"tokenizer {name!r} is not a SentencePiece model of LLaMA's kind (BPE without normalization)")
    return tokenizer


def read_llama2c_tokenizer(path: str | Path, name: str | None = None) -> StoryTokenizer:
    """Reads a tokenizer.bin of llama2.c: the longest piece's length (int32), then for each token its score (float32),
    length (int32) and bytes, little-endian, to the end of the file.

    Raises:
        InputError: the file is not one.
    """
    path, name = Path(path), name or str(path)
    pieces, scores, offset = [], [], 4
    try:
        data = path.read_bytes()
        (longest,) = struct.unpack_from("<i", data, 0)
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            if not (0 <= length <= longest and offset + 8 + length <= len(data) and score == score):
                raise struct.error
            pieces.append(data[offset + 8 : offset + 8 + length])
            scores.append(score)
            offset += 8 + length
    except OSError as error:
        raise InputError(f"tokenizer {name!r} cannot be read ({error.strerror}); expected {_KINDS}") from None
    except struct.error:
        raise InputError(f"tokenizer {name!r} is not a llama2.c tokenizer (or truncated); expected {_KINDS}") from None
    pieces[:3] = SPECIALS[: len(pieces)]  # llama2.c writes "\n<s>\n", or for unk whatever it prints
    return from_pieces(pieces, scores, name=name)


def write_llama2c_tokenizer(tokenizer: StoryTokenizer, path: str | Path) -> None:
    """Writes the tokenizer.bin that llama2.c reads.

    Its C program hard-codes bos 1, eos 2 and the bytes at 3 to 258. If the bytes are elsewhere, as in Mistral's,
    it decodes correctly, but encodes newlines and rare characters of a prompt as other tokens.

    Raises:
        InputError: the tokenizer has another bos or eos, or is not a byte-fallback BPE.
    """
    backend = tokenizer.backend
    if tokenizer.byte_ids is None or (tokenizer.bos_id, tokenizer.eos_id) != (1, 2):
        raise InputError("llama2.c needs a byte-fallback tokenizer with bos 1 and eos 2; train with tokenizer 'train'")
    scores = piece_scores(tokenizer)
    pieces = [backend.id_to_token(i) or "" for i in range(tokenizer.vocab_size)]
    marked = {1: b"\n<s>\n", 2: b"\n</s>\n"}
    texts = [marked.get(i, piece.replace(SPACE, " ").encode()) for i, piece in enumerate(pieces)]
    with open(path, "wb") as file:
        file.write(struct.pack("<i", max(map(len, texts))))
        for piece, text in zip(pieces, texts, strict=True):
            score = scores.get(piece, -float(len(scores)))  # characters, bytes, specials: never the result of a merge
            file.write(struct.pack("<fi", score, len(text)) + text)


_READERS = {
    ".json": _read_json,
    ".model": _read_sentencepiece,
    ".bin": read_llama2c_tokenizer,
    ".gguf": lambda path, _: read_gguf_tokenizer(path),
}
