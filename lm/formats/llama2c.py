"""Weights to and from llama2.c (https://github.com/karpathy/llama2.c), format version 0.

A file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len; vocab_size is negative
if the head is not tied), then float32 tensors in the order of `_file_order`, with two rotary tables that llama2.c
skips. Rotary pairs are neighbors, 2i and 2i + 1, so that rows of query and key matrices are reordered. Rotary base and
epsilon are constants of llama2.c.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment.errors import InputError
from lm.data.tokenizer import StoryTokenizer
from lm.data.tokenizer_files import read_llama2c_tokenizer, write_llama2c_tokenizer
from lm.formats.hugging_face import (
    all_or_nothing,
    check_vocabulary,
    join_weights,
    parameter_shape,
    refuse_existing,
    split_weights,
)
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder, rotary_tables

_HEADER = struct.Struct("<7i")
_ROPE_THETA, _RMS_NORM_EPS = 10000.0, 1e-5
_LAYER_ORDER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
_ROTATED = ("q_proj.weight", "k_proj.weight")


def _file_order(config: DecoderConfig) -> Iterator[str]:
    yield "model.embed_tokens.weight"
    for part in _LAYER_ORDER:
        for layer in range(config.num_layers):
            yield f"model.layers.{layer}.{part}.weight"
    yield "model.norm.weight"
    yield "rotary tables"
    if not config.tie_embeddings:
        yield "lm_head.weight"


def _num_floats(config: DecoderConfig) -> int:
    """Size of the file without its header; arithmetic only, since a header may claim anything."""
    layer = sum(math.prod(parameter_shape(config, f"{part}.weight")) for part in _LAYER_ORDER)
    embedding = config.vocab_size * config.hidden_size
    tables = config.max_sequence_length * config.head_dim
    return embedding * (1 if config.tie_embeddings else 2) + config.num_layers * layer + config.hidden_size + tables


def halves_to_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def neighbours_to_halves(weight: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_llama2c(decoder: Decoder, tokenizer: StoryTokenizer, path: str | Path) -> None:
    """Write a checkpoint (version 0, float32) that llama2.c's `run` loads, and its tokenizer beside it.

    Args:
        decoder: With rope_theta 10000 and rms_norm_eps 1e-5, which are constants of llama2.c, and neither
            query_key_norm nor value_residual.
        tokenizer: Written to the same folder, under the name of `llama2c_tokenizer_path`.
        path: The file to write; neither it nor the tokenizer's may exist.

    Raises:
        InputError: If a file exists, or llama2.c cannot express the decoder or the tokenizer.
    """
    path, config = Path(path), decoder.config
    refuse_existing(path)
    refuse_existing(llama2c_tokenizer_path(path))
    check_vocabulary(config, tokenizer)
    weights, half = split_weights(decoder), config.head_dim // 2
    for name, found, expected in (
        ("rope_theta", config.rope_theta, _ROPE_THETA),
        ("rms_norm_eps", config.rms_norm_eps, _RMS_NORM_EPS),
        ("query_key_norm", config.query_key_norm, False),
    ):
        if found != expected:
            raise InputError(f"{name}={found}: llama2.c supports only {expected}; export to Hugging Face instead")
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"vocab_size={config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens, and llama2.c needs "
            "equal numbers; export to Hugging Face instead"
        )
    cos, sin = rotary_tables(config.max_sequence_length, config.head_dim, config.rope_theta)
    weights["rotary tables"] = torch.cat((cos[:, :half], sin[:, half:]))
    sizes = config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.kv_heads
    vocab_size = config.vocab_size if config.tie_embeddings else -config.vocab_size
    with all_or_nothing(path) as partial:
        write_llama2c_tokenizer(tokenizer, llama2c_tokenizer_path(partial))
        with partial.open("wb") as file:
            file.write(_HEADER.pack(*sizes, vocab_size, config.max_sequence_length))
            for name in _file_order(config):
                weight = weights[name]
                if name.endswith(_ROTATED):
                    weight = halves_to_neighbours(weight, config.head_dim)
                file.write(weight.numpy().astype("<f4").tobytes())
        llama2c_tokenizer_path(partial).replace(llama2c_tokenizer_path(path))


def llama2c_tokenizer_path(path: str | Path) -> Path:
    """Where `to_llama2c` writes the tokenizer of a checkpoint: model.bin, model.tokenizer.bin."""
    return Path(path).with_suffix(".tokenizer.bin")


def from_llama2c(path: str | Path, tokenizer_path: str | Path) -> tuple[Decoder, StoryTokenizer]:
    """The decoder and the tokenizer of a llama2.c checkpoint (version 0, float32).

    Raises:
        InputError: If a file cannot be read, its header is impossible or does not match the file's size, or the
            tokenizer belongs to another model.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a llama2.c checkpoint") from None
    if len(header) < _HEADER.size:
        raise InputError(f"{path} has {size} bytes, less than the header of a llama2.c checkpoint; copy it again")
    if header[:4] == b"24ka":  # "ak42" as an integer
        raise InputError(f"{path} has a later version of llama2.c's format; export it with --version 0")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = _HEADER.unpack(header)
    try:
        config = DecoderConfig(
            vocab_size=abs(vocab_size),
            hidden_size=dim,
            intermediate_size=hidden_dim,
            num_layers=n_layers,
            num_heads=n_heads,
            num_kv_heads=n_kv_heads,
            max_sequence_length=max_seq_len,
            rope_theta=_ROPE_THETA,
            rms_norm_eps=_RMS_NORM_EPS,
            tie_embeddings=vocab_size > 0,
        )
    except ValueError as error:
        raise InputError(f"{path} is not a llama2.c checkpoint of version 0: its header says {error}") from None
    if size != (expected := _HEADER.size + 4 * _num_floats(config)):
        raise InputError(
            f"{path} has {size} bytes, but its header asks for {expected}; it is truncated or no llama2.c checkpoint "
            "of version 0"
        )
    tokenizer = read_llama2c_tokenizer(tokenizer_path)
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{tokenizer_path} has {tokenizer.vocab_size} tokens, but {path} {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )
    floats = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=_HEADER.size).astype(np.float32, copy=False))
    weights, start = {}, 0
    for name in _file_order(config):
        if name == "rotary tables":
            start += config.max_sequence_length * config.head_dim
            continue
        shape = parameter_shape(config, name)
        weight = floats[start : start + math.prod(shape)].view(shape)
        start += weight.numel()
        weights[name] = neighbours_to_halves(weight, config.head_dim) if name.endswith(_ROTATED) else weight
    return join_weights(config, weights), tokenizer
