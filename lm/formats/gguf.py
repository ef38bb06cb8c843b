"""Models to and from GGUF, the format of llama.cpp and Ollama.

Files are read and written with `gguf`, the package of llama.cpp's authors
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Of its architectures, `llama` is ours, with rotary pairs
that are neighbors, as in llama2.c; `qwen3` is ours with query_key_norm, with pairs as here. Quantized weights are read
into float32; what is read is compared with the header's shape first.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from experiment.errors import InputError
from lm.data.gguf_tokenizer import add_tokenizer, gguf_package, open_gguf, read_field, read_tokenizer
from lm.data.tokenizer import StoryTokenizer
from lm.formats.hugging_face import (
    LONGEST_CONTEXT,
    all_or_nothing,
    check_vocabulary,
    join_weights,
    parameter_names,
    parameter_shape,
    refuse_existing,
    split_weights,
)
from lm.formats.llama2c import halves_to_neighbours, neighbours_to_halves
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder

if TYPE_CHECKING:
    from gguf import GGUFReader

GGUFType = Literal["f32", "f16", "q8_0"]
_ROTATED = ("q_proj.weight", "k_proj.weight")


def _architecture(config: DecoderConfig) -> str:
    return "qwen3" if config.query_key_norm else "llama"


def _tensor_names(config: DecoderConfig) -> dict[str, str]:
    """Hugging Face's names of the parameters, and those of GGUF."""
    gguf = gguf_package()
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[_architecture(config)]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    theirs = [part for parts in parameter_names(config).values() for part in parts]
    return {name: names.get_name(name, try_suffixes=(".weight",)) for name in theirs}


def to_gguf(decoder: Decoder, tokenizer: StoryTokenizer, path: str | Path, type: GGUFType = "f32") -> None:
    """Write a model with its tokenizer as one file that llama.cpp and Ollama run.

    Args:
        decoder: Without value_residual; with query_key_norm it becomes a Qwen3.
        tokenizer: The one the decoder was trained with: a byte-fallback BPE, or a byte-level one whose way to split
            words llama.cpp knows (GPT-2's, SmolLM's, Llama 3's).
        path: The file to write, atomically; it must not exist.
        type: Of the matrices: f32; f16; or q8_0, 8 bits in blocks of 32 (a matrix whose rows are no multiple of 32
            stays f16). Norms are float32.

    Raises:
        InputError: If the file exists, llama.cpp cannot express the decoder or the tokenizer, or `gguf` is not
            installed.
    """
    gguf, path, config = gguf_package(), Path(path), decoder.config
    refuse_existing(path)
    check_vocabulary(config, tokenizer)
    weights = split_weights(decoder)
    with all_or_nothing(path) as partial:
        writer = gguf.GGUFWriter(partial, _architecture(config))
        writer.add_name(path.stem)
        writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[type])
        for name, value in {
            "vocab_size": config.vocab_size, "context_length": config.max_sequence_length,
            "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
            "block_count": config.num_layers, "head_count": config.num_heads, "head_count_kv": config.kv_heads,
            "key_length": config.head_dim, "value_length": config.head_dim, "rope_dimension_count": config.head_dim,
            "rope_freq_base": config.rope_theta, "layer_norm_rms_eps": config.rms_norm_eps,
        }.items():  # fmt: skip
            getattr(writer, f"add_{name}")(value)
        add_tokenizer(writer, tokenizer, config.vocab_size)
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


def from_gguf(path: str | Path) -> tuple[Decoder, StoryTokenizer]:
    """The decoder, in float32, and the tokenizer of a GGUF file with a LLaMA or a Qwen3, whatever its quantization.

    Raises:
        InputError: If the file cannot be read or is cut short, is of another architecture, of a quantization that
            `gguf` does not know, or has features our decoder lacks; or `gguf` is not installed.
    """
    path = Path(path)
    reader = open_gguf(path)
    config = _read_config(reader, path)
    tokenizer = read_tokenizer(reader, path)
    check_vocabulary(config, tokenizer)
    return join_weights(config, _read_weights(reader, config, path)), tokenizer


def _read_config(reader: "GGUFReader", path: Path) -> DecoderConfig:
    architecture = read_field(reader, path, "general.architecture", str)
    if architecture not in ("llama", "qwen3"):
        raise InputError(f"{path}: architecture {architecture!r}; only 'llama' and 'qwen3' can be imported")

    def field(name: str, kinds: Any = int, default: Any = None) -> Any:
        return read_field(reader, path, f"{architecture}.{name}", kinds, default)

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
            raise InputError(f"{path}: {name} {found!r}; our decoder supports {accepted[0]!r} only: import another")
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
    gguf, shapes, names = gguf_package(), _shapes(reader), _tensor_names(config)
    for name, theirs in names.items():
        if shapes.get(theirs) != (expected := parameter_shape(config, name)):
            raise InputError(f"{path}: {theirs} is {shapes.get(theirs, 'missing')}, but its header asks for {expected}")
    if surplus := [theirs for theirs in shapes if theirs not in names.values()]:
        raise InputError(f"{path}: our decoder has no parameter for {surplus[0]}; import another model")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name, theirs in names.items():
        tensor = tensors[theirs]
        try:
            weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except NotImplementedError:
            raise InputError(
                f"{path}: {theirs} is in {tensor.tensor_type.name}, which gguf cannot read; use the file in f32, "
                "f16 or q8_0"
            ) from None
        weight = weight.view(parameter_shape(config, name))
        if not config.query_key_norm and name.endswith(_ROTATED):
            weight = neighbours_to_halves(weight, config.head_dim)
        weights[name] = weight
    return weights
