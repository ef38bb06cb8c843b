"""Weights and tokenizers to and from GGUF, the format of llama.cpp and Ollama.

The file is read and written by `gguf`, the package of llama.cpp's authors
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Of its architectures, `llama` is ours, with rotary pairs
that are neighbours, as in llama2.c; `qwen3` is ours with query_key_norm, with pairs as here. Quantized weights are read
into float32; what is read is compared with the header's shape first.
"""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from experiment.errors import InputError
from lm.hugging_face import (
    LONGEST_CONTEXT,
    check_vocabulary,
    join_weights,
    parameter_names,
    parameter_shape,
    split_weights,
)
from lm.llama2c import halves_to_neighbours, neighbours_to_halves
from lm.model import Decoder, DecoderConfig
from lm.tokenizer import StoryTokenizer, from_pieces, piece_scores

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

GGUFType = Literal["f32", "f16", "q8_0"]
_ROTATED = ("q_proj.weight", "k_proj.weight")
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


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise InputError("the package gguf is not installed: pip install gguf (or 'tinylab[gguf]')") from None
    return gguf


def _architecture(config: DecoderConfig) -> str:
    return "qwen3" if config.query_key_norm else "llama"


def _tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Hugging Face's names of the parameters, and those of GGUF."""
    gguf = _gguf()
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[_architecture(config)]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    theirs = [part for parts in parameter_names(config).values() for part in parts]
    return {name: names.get_name(name, try_suffixes=(".weight",)) for name in theirs}


# ---------------------------------------------------------------- out


def to_gguf(decoder: Decoder, tokenizer: StoryTokenizer, path: str | Path, type: GGUFType = "f32") -> None:
    """Write a model with its tokenizer as one file that llama.cpp and Ollama run.

    Args:
        decoder: Without value_residual; with query_key_norm it becomes a Qwen3.
        tokenizer: The one the decoder was trained with: a byte-fallback BPE, or a byte-level one whose way to split
            words llama.cpp knows (GPT-2's, SmolLM's, Llama 3's).
        path: The file to write, whole or not at all.
        type: Of the matrices: f32; f16; or q8_0, 8 bits in blocks of 32 (a matrix whose rows are no multiple of 32
            stays f16). Norms are float32.

    Raises:
        InputError: If llama.cpp cannot express the decoder or the tokenizer, or `gguf` is not installed.
    """
    gguf, path, config = _gguf(), Path(path), decoder.config
    check_vocabulary(config, tokenizer)
    weights = split_weights(decoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
        partial = Path(scratch) / path.name
        writer = gguf.GGUFWriter(partial, _architecture(config))
        writer.add_name(path.stem)
        writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[type])
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_sequence_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_block_count(config.num_layers)
        writer.add_head_count(config.num_heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        for name, theirs in _tensor_names(config).items():
            weight = weights[name]
            if not config.query_key_norm and name.endswith(_ROTATED):
                weight = halves_to_neighbours(weight, config.head_dim)
            kind = type.upper() if weight.ndim > 1 else "F32"
            if kind == "Q8_0" and weight.shape[-1] % 32:
                kind = "F16"
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(theirs, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: StoryTokenizer, vocab_size: int) -> None:
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
                "llama.cpp does not know this tokenizer's way to split words: it must be a byte-fallback BPE, or a "
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


# ---------------------------------------------------------------- in


def from_gguf(path: str | Path) -> tuple[Decoder, StoryTokenizer]:
    """The decoder, in float32, and the tokenizer of a GGUF file with a LLaMA or a Qwen3, whatever its quantization.

    Raises:
        InputError: If the file cannot be read or is cut short, is of another architecture, of a quantization that
            `gguf` does not know, or has what our decoder has not; or `gguf` is not installed.
    """
    path = Path(path)
    reader = _open(path)
    config = _read_config(reader, path)
    tokenizer = _read_tokenizer(reader, path)
    check_vocabulary(config, tokenizer)
    return join_weights(config, _read_weights(reader, config, path)), tokenizer


def read_gguf_tokenizer(path: str | Path, name: str | None = None) -> StoryTokenizer:
    """The tokenizer of a GGUF file; errors as in `from_gguf`."""
    return _read_tokenizer(_open(Path(path)), Path(path))


def _open(path: Path) -> "GGUFReader":
    gguf = _gguf()

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            # What the file does not hold is an empty array else, and a claimed length of 2^60 is tried.
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends early")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a GGUF file") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError) as error:
        cause = " ".join(str(error).split())
        if found := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", cause):
            raise InputError(f"{path}: quantization {found[1]} is unknown; take the file in f32, f16 or q8_0") from None
        raise InputError(f"{path} is no whole GGUF file ({cause}); copy it again") from None


def _field(reader: "GGUFReader", path: Path, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
    field = reader.get_field(name)
    try:
        value = default if field is None else field.contents()
    except (ValueError, IndexError, TypeError):  # no UTF-8
        value = None
    if value is None or not isinstance(value, kinds):
        raise InputError(f"{path}: {name} is {'missing' if field is None else 'damaged'}; copy the file again")
    return value


def _read_config(reader: "GGUFReader", path: Path) -> DecoderConfig:
    architecture = _field(reader, path, "general.architecture", str)
    if architecture not in ("llama", "qwen3"):
        raise InputError(f"{path}: architecture {architecture!r}; only 'llama' and 'qwen3' can be imported")

    def field(name: str, kinds: Any = int, default: Any = None) -> Any:
        return _field(reader, path, f"{architecture}.{name}", kinds, default)

    hidden_size, num_heads = field("embedding_length"), field("attention.head_count")
    head_dim = hidden_size // max(1, num_heads)
    scaling = field("rope.scaling.type", str, "none")
    for name, found, accepted in (
        ("rope.scaling.type", scaling, ("none", "")),
        ("rope.dimension_count", field("rope.dimension_count", int, head_dim), (head_dim,)),
        ("attention.key_length", field("attention.key_length", int, head_dim), (head_dim,)),
        ("attention.value_length", field("attention.value_length", int, head_dim), (head_dim,)),
        ("expert_count", field("expert_count", int, 0), (0,)),
    ):
        if found not in accepted:
            raise InputError(f"{path}: {name} {found!r}; our decoder knows {accepted[0]!r} alone: import another model")
    shapes = _shapes(reader)
    try:
        config = DecoderConfig(
            vocab_size=shapes.get("token_embd.weight", (0,))[0],
            hidden_size=hidden_size,
            intermediate_size=field("feed_forward_length"),
            num_layers=field("block_count"),
            num_heads=num_heads,
            num_kv_heads=field("attention.head_count_kv", int, num_heads),
            max_sequence_length=field("context_length"),
            rope_theta=float(field("rope.freq_base", float, 10000.0)),
            rms_norm_eps=float(field("attention.layer_norm_rms_epsilon", float)),
            tie_embeddings="output.weight" not in shapes,
            query_key_norm=architecture == "qwen3",
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if config.max_sequence_length > LONGEST_CONTEXT or config.num_layers > len(shapes):
        raise InputError(
            f"{path}: a context of {config.max_sequence_length} and {config.num_layers} layers cannot be those of "
            f"{len(shapes)} tensors; copy it again"
        )
    return config


def _shapes(reader: "GGUFReader") -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}


def _read_weights(reader: "GGUFReader", config: DecoderConfig, path: Path) -> dict[str, Tensor]:
    gguf, shapes, names = _gguf(), _shapes(reader), _tensor_names(config)
    for name, theirs in names.items():
        if shapes.get(theirs) != (expected := parameter_shape(config, name)):
            raise InputError(f"{path}: {theirs} is {shapes.get(theirs, 'missing')}, but its header asks for {expected}")
    if surplus := [theirs for theirs in shapes if theirs not in names.values()]:
        raise InputError(f"{path}: our decoder has no place for {surplus[0]}; import another model")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name, theirs in names.items():
        tensor = tensors[theirs]
        try:
            weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except NotImplementedError:
            raise InputError(
                f"{path}: {theirs} is in {tensor.tensor_type.name}, which gguf cannot read; take the file in f32, "
                "f16 or q8_0"
            ) from None
        weight = weight.view(parameter_shape(config, name))
        if not config.query_key_norm and name.endswith(_ROTATED):
            weight = neighbours_to_halves(weight, config.head_dim)
        weights[name] = weight
    return weights


def _read_tokenizer(reader: "GGUFReader", path: Path) -> StoryTokenizer:
    def field(name: str, kinds: Any, default: Any = None) -> Any:
        return _field(reader, path, f"tokenizer.ggml.{name}", kinds, default)

    model, tokens = field("model", str), field("tokens", list)
    eos_id = field("eos_token_id", int)
    bos_id, pad_id = field("bos_token_id", int, eos_id), field("padding_token_id", int, eos_id)
    kinds = field("token_type", list, [_NORMAL] * len(tokens))
    if len(kinds) != len(tokens) or not all(0 <= i < len(tokens) for i in (bos_id, eos_id, pad_id)):
        raise InputError(f"{path}: the tokenizer's lists do not agree; copy the file again")
    # Other kinds of tokens, such as those of a chat, are no text either.
    special = [i for i, kind in enumerate(kinds) if kind not in (_NORMAL, _BYTE)]
    if model == "llama":
        if not field("add_space_prefix", bool, True):
            raise InputError(f"{path}: tokenizer.ggml.add_space_prefix false is not supported; import another model")
        scores = field("scores", list)
        if len(scores) != len(tokens) or 0 not in special:
            raise InputError(f"{path}: the tokenizer's scores or its unknown token are missing; copy the file again")
        tokenizer = from_pieces(tokens, scores, bos_id, eos_id, special, str(path), field("add_bos_token", bool, True))
        tokenizer.chat_template = _field(reader, path, "tokenizer.chat_template", str, "") or None
        return tokenizer
    if model != "gpt2":
        raise InputError(f"{path}: tokenizer {model!r}; only 'llama' and 'gpt2' can be imported")
    pre = field("pre", str, "gpt-2")
    if pre not in _WORDS:
        raise InputError(f"{path}: tokenizer.ggml.pre {pre!r}; known are {', '.join(_WORDS)}: import another model")
    merges = [tuple(merge.split(" ")) for merge in field("merges", list)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the Rust library raises plain Exception
        raise InputError(f"{path}: its tokenizer is damaged ({error}); copy the file again") from None
    backend.pre_tokenizer, backend.decoder = _WORDS[pre], decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    tokenizer = StoryTokenizer(backend, bos_id, eos_id, pad_id, str(path))
    tokenizer.chat_template = _field(reader, path, "tokenizer.chat_template", str, "") or None
    if field("add_bos_token", bool, False):
        tokenizer.begin_with_bos()
    return tokenizer
