"""Weights to and from Hugging Face's Llama, and its Qwen3 if queries and keys are normalized.

These are the same models as ours under other names, with query, key and value, and gate and up, in separate
matrices; rotary pairs are element i of each half of a head. Only json and safetensors are read, so nothing in a
folder is executed, and names and shapes are checked before memory is allocated.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiment.errors import InputError
from lm.data.tokenizer import StoryTokenizer
from lm.data.tokenizer_files import load_tokenizer
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder
from lm.model.variants import VariantDecoder

# Ours: theirs, from the first row of our matrix to the last.
_BLOCK = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
}
_QUERY_KEY_NORM = {"attention.query_norm": ("self_attn.q_norm",), "attention.key_norm": ("self_attn.k_norm",)}
# Fields of DecoderConfig and of config.json, with the defaults of transformers' LlamaConfig.
_CONFIG = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("hidden_size", None),
    "intermediate_size": ("intermediate_size", None),
    "num_layers": ("num_hidden_layers", None),
    "num_heads": ("num_attention_heads", None),
    "num_kv_heads": ("num_key_value_heads", None),
    "max_sequence_length": ("max_position_embeddings", 2048),
}
LONGEST_CONTEXT = 2**22  # a config.json could ask for rotary tables of any size


def parameter_names(config: DecoderConfig) -> dict[str, list[str]]:
    """Our parameters and Hugging Face's that each is stacked from."""
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    block = _BLOCK | (_QUERY_KEY_NORM if config.query_key_norm else {})
    for layer in range(config.num_layers):
        for ours, parts in block.items():
            names[f"blocks.{layer}.{ours}.weight"] = [f"model.layers.{layer}.{part}.weight" for part in parts]
    if not config.tie_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    return names


def parameter_shape(config: DecoderConfig, name: str) -> tuple[int, ...]:
    """Shape of a parameter of Hugging Face's model."""
    hidden, inner, key = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
    shapes = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (hidden, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
    }
    return shapes.get(name.split(".")[-2], (hidden,))  # the rest are norms of the residual stream


def split_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's weights under Hugging Face's names, in float32 on the CPU.

    Raises:
        InputError: If it has features that no other program supports.
    """
    if decoder.config.value_residual:
        raise InputError("value_residual=True: no other program supports it; train without it to export")
    if isinstance(decoder, VariantDecoder):
        named = ", ".join(f"model.variant.{name} {value}" for name, value in decoder.variant.changed.items())
        raise InputError(f"{named}: no other program supports it; train without it to export")
    state = decoder.state_dict()
    weights = {}
    for ours, parts in parameter_names(decoder.config).items():
        rows = [parameter_shape(decoder.config, part)[0] for part in parts]
        for part, weight in zip(parts, state[ours].detach().float().cpu().split(rows), strict=True):
            weights[part] = weight.contiguous()
    return weights


def join_weights(config: DecoderConfig, weights: dict[str, Tensor]) -> Decoder:
    """A decoder, in float32, from weights under Hugging Face's names."""
    decoder = Decoder(config)
    state = {
        ours: torch.cat([weights[part].float() for part in parts]) for ours, parts in parameter_names(config).items()
    }
    decoder.load_state_dict(state)
    return decoder.eval()


def check_vocabulary(config: DecoderConfig, tokenizer: StoryTokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {config.vocab_size}; "
            "give the tokenizer that the model was trained with"
        )


def refuse_existing(path: Path) -> None:
    """Raise an InputError if an export would overwrite the path; it may be an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already; give a new name")


def to_hugging_face(decoder: Decoder, tokenizer: StoryTokenizer, folder: str | Path) -> None:
    """Write a folder that transformers' `AutoModelForCausalLM` and `AutoTokenizer` load.

    Args:
        decoder: Written in float32.
        tokenizer: The one the decoder was trained with.
        folder: Created atomically; must be new or empty.

    Raises:
        InputError: If the folder holds something, the tokenizer is another model's, or no model there has the
            decoder's values.
    """
    folder = Path(folder)
    check_vocabulary(decoder.config, tokenizer)
    refuse_existing(folder)
    weights, config = split_weights(decoder), decoder.config
    description = {
        "architectures": ["Qwen3ForCausalLM" if config.query_key_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.query_key_norm else "llama",
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _CONFIG.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        # transformers 5 reads the second, transformers 4 the first.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    description |= special
    defaults = special | {"pad_token_id": tokenizer.pad_id}  # in config.json it would freeze the token's embedding
    with all_or_nothing(folder) as partial:
        tokenizer.save(partial)
        (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (partial / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def all_or_nothing(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder, which is renamed once complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
        partial = Path(scratch) / path.name
        yield partial
        partial.replace(path)


def from_hugging_face(folder: str | Path) -> tuple[Decoder, StoryTokenizer]:
    """The decoder, in float32, and the tokenizer of a local folder with a Llama or a Qwen3.

    Raises:
        InputError: If something is missing or damaged, or the model has features our decoder lacks: scaled rotary
            positions, biases, another activation, heads of another size, another architecture, quantized weights.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = _read_weights(folder, config)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(config, tokenizer)
    return join_weights(config, weights), tokenizer


def _read_weights(folder: Path, config: DecoderConfig) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files, read after names and shapes match the config."""
    files = _weight_files(folder)
    try:
        shapes = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if config.num_layers > len(shapes):
            raise InputError(f"{folder}: {len(shapes)} tensors cannot be the {config.num_layers} layers of config.json")
        names = [part for parts in parameter_names(config).values() for part in parts]
        for name in names:
            if shapes.get(name) != parameter_shape(config, name):
                found = shapes.get(name, "missing")
                raise InputError(
                    f"{folder}: {name} is {found}, but config.json asks for {parameter_shape(config, name)}"
                )
        # Rotary tables are recomputed; a tied head may be stored twice.
        redundant = ".rotary_emb.inv_freq", "lm_head.weight"
        if surplus := [name for name in shapes if name not in names and not name.endswith(redundant)]:
            raise InputError(f"{folder}: our decoder has no parameter for {surplus[0]}; import another model")
        weights = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} holds no complete safetensors file ({error}); copy it again") from None
    return weights


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise InputError(
                f"{folder} holds no model.safetensors; other formats can run code when they are read, "
                "so save the model again with transformers' save_pretrained"
            )
        return [folder / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is not an index of safetensors files; copy it again") from None
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise InputError(f"{index} names {outside[0]!r}, which is not a file of this folder; copy it again")
    return sorted(folder / name for name in names)


def _read_config(folder: Path) -> DecoderConfig:
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); give a folder written by `save_pretrained`"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); copy the folder again") from None
    model_type = described.get("model_type") if isinstance(described, dict) else None
    if model_type not in ("llama", "qwen3"):
        raise InputError(f"{path}: model_type {model_type!r}; only 'llama' and 'qwen3' can be imported")
    rope = described.get("rope_parameters") or {}
    scaling = described.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", rope.get("rope_type", "default")))
    if described.get("num_key_value_heads") is None:
        described["num_key_value_heads"] = described.get("num_attention_heads")
    sizes = {ours: _integer(described, theirs, path, default) for ours, (theirs, default) in _CONFIG.items()}
    head_dim = sizes["hidden_size"] // max(1, sizes["num_heads"])
    for name, found, accepted in (
        ("rope_type", rope_type, ("default",)),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,)),
        ("attention_bias", described.get("attention_bias"), (None, False)),
        ("mlp_bias", described.get("mlp_bias"), (None, False)),
        ("hidden_act", described.get("hidden_act", "silu"), ("silu", "swish")),
        ("head_dim", described.get("head_dim"), (None, head_dim)),
        ("use_sliding_window", described.get("use_sliding_window"), (None, False)),
        ("quantization_config", described.get("quantization_config"), (None,)),
    ):
        if found not in accepted:
            raise InputError(
                f"{path}: {name} {found!r}; our decoder supports only {accepted[-1]!r}, so import another model"
            )
    try:
        config = DecoderConfig(
            **sizes,
            rope_theta=float(rope.get("rope_theta", described.get("rope_theta", 10000.0))),
            rms_norm_eps=float(described.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(described.get("tie_word_embeddings", False)),
            query_key_norm=model_type == "qwen3",
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if config.max_sequence_length > LONGEST_CONTEXT:
        raise InputError(
            f"{path}: max_position_embeddings {config.max_sequence_length} is beyond {LONGEST_CONTEXT}; lower it"
        )
    return config


def _integer(described: dict[str, Any], name: str, path: Path, default: int | None = None) -> int:
    found = described.get(name)
    if found is None:
        found = default
    if not isinstance(found, int) or isinstance(found, bool):
        raise InputError(f"{path}: {name} {found!r}; expected an integer")
    return found
