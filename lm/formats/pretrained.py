"""Pretrained weights and tokenizers: from a run, a checkpoint, or other programs' formats."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace

from experiment.errors import InputError
from experiment.nn.lora_config import LoRAConfig
from experiment.sources.hub import look_for_hub
from lm.data.tokenizer import StoryTokenizer
from lm.data.tokenizer_files import load_tokenizer
from lm.formats.adapters import adapted, base_weights, merged, our_key
from lm.formats.gguf import from_gguf
from lm.formats.hugging_face import from_hugging_face
from lm.formats.llama2c import from_llama2c, llama2c_tokenizer_path
from lm.model.config import DecoderConfig, Variant
from lm.model.decoder import Decoder
from lm.model.variants import make_decoder

BASE = "base.pt"  # next to checkpoints that hold only an adapter: the base weights
_KINDS = "a run's folder, a checkpoint, a Hugging Face folder or hub name, a llama2.c .bin or a .gguf"


def load_pretrained(name: str | Path, tokenizer: str | None = None) -> tuple[Decoder, StoryTokenizer, str]:
    """The decoder, in float32, and the tokenizer of a run, a checkpoint, a Hugging Face folder or hub name, a llama2.c
    .bin or a .gguf.

    Args:
        name: Path or hub name.
        tokenizer: Of a llama2.c .bin; by default model.tokenizer.bin, tokenizer.bin or tok512.bin next to it.

    Returns:
        The decoder in eval mode, adapters merged; the tokenizer; and the tokenizer's path or name.

    Raises:
        InputError: It does not exist, cannot be read, or does not fit our decoder.
    """
    # These bring Lightning, which --help need not wait for.
    from experiment.runs.reading import find_checkpoint
    from experiment.runs.run import is_run, run_of

    path = Path(name).expanduser()
    if not path.exists():
        if path.suffix or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
            raise InputError(f"{name} does not exist: expected {_KINDS}")
        path = _from_hub(str(name))
    if path.suffix != ".bin" and tokenizer is not None:
        raise InputError(f"tokenizer {tokenizer}: the one in {name} is used; leave the option out")
    if path.is_dir() and is_run(path) and not (path / "config.json").is_file():
        path = find_checkpoint(path)
    if path.is_dir():
        decoder, loaded = from_hugging_face(path)
        where = path
    elif path.suffix == ".gguf":
        decoder, loaded = from_gguf(path)
        where = path
    elif path.suffix == ".bin":
        where = Path(tokenizer or _tokenizer_beside(path))
        decoder, loaded = from_llama2c(path, where)
    else:
        decoder, loaded = load_checkpoint(path)
        where = run_of(path) / "tokenizer"
    if decoder.config.vocab_size != loaded.vocab_size:
        raise InputError(
            f"{name} has {decoder.config.vocab_size} embeddings, but its tokenizer {loaded.vocab_size} "
            "tokens; cut the embeddings with transformers' resize_token_embeddings and save it again"
        )
    return decoder, loaded, str(where)


def take_shape(config: Namespace, flags: Collection[str], checkpoint: Mapping[str, Any]) -> None:
    """Set a configuration's shape, tokenizer and adapter options from the weights it starts from.

    Args:
        config: Of a command, with model.init_from.
        flags: Options given by the user, which must agree.
        checkpoint: The checkpoint that the command uses; empty for model.init_from.

    Raises:
        InputError: They do not agree, or as `load_pretrained`.
    """
    decoder = None
    if checkpoint:
        hyper_parameters = checkpoint.get("hyper_parameters", {})
        with suppress(TypeError, KeyError, ValueError):
            decoder = DecoderConfig(**hyper_parameters["decoder"])
        for name, value in hyper_parameters.get("lora", {}).items():
            if f"model.lora.{name}" not in flags and name != "lora_dropout":
                config[f"model.lora.{name}"] = value
    elif config.model.init_from is not None:
        source, _, tokenizer = load_pretrained(config.model.init_from)
        decoder = source.config
        if "data.tokenizer" not in flags:
            config.data.tokenizer = tokenizer
    for name, value in ({} if decoder is None else asdict(decoder)).items():
        flag = f"model.decoder.{name}"
        if name in ("vocab_size", "dropout") or (name == "max_sequence_length" and flag in flags):
            continue
        if flag in flags and config[flag] != value:
            raise InputError(f"{flag} {config[flag]}: the pretrained weights have {value}; leave it out")
        config[flag] = value


def load_weights(decoder: Decoder, name: str) -> None:
    """Load the weights of `load_pretrained` into a decoder.

    Raises:
        InputError: As there, or the shapes differ.
    """
    source, _, _ = load_pretrained(name)
    ours, theirs = asdict(decoder.config), asdict(source.config)
    for config in (ours, theirs):
        config["num_kv_heads"] = config["num_kv_heads"] or config["num_heads"]
    for key in sorted(ours.keys() - {"dropout", "max_sequence_length"}):
        if ours[key] != theirs[key]:
            raise InputError(f"model.decoder.{key} {ours[key]}: model.init_from {name} has {theirs[key]}; leave it out")
    try:
        decoder.load_state_dict(source.state_dict())
    except RuntimeError:
        raise InputError(f"model.init_from {name} is a variant of the decoder; use another model") from None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    look_for_hub()
    patterns = ["config.json", "model*.safetensors*", "tokenizer*", "special_tokens_map.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError):  # no such name or network: all hub errors derive from these
        raise InputError(
            f"{name} could not be downloaded from the Hub, and is not a local path; expected {_KINDS}"
        ) from None


def load_checkpoint(checkpoint: str | Path, tokenizer: str | None = None) -> tuple[Decoder, StoryTokenizer]:
    """The decoder, with any adapter merged, and the tokenizer of a checkpoint written by `tinylab lm fit`.

    Args:
        checkpoint: The file, or a run's folder: its best, or else its last.
        tokenizer: As `--data.tokenizer`; None for the one named in the run's config.yaml.

    Raises:
        InputError: If the file is damaged or from another model, or the tokenizer cannot be found.
    """
    from experiment.runs.reading import find_checkpoint

    checkpoint = Path(checkpoint).expanduser()
    checkpoint = checkpoint if checkpoint.is_file() else find_checkpoint(checkpoint)
    decoder, lora = load_adapted(checkpoint)
    if lora is not None:
        decoder = merged(decoder, lora)
    return decoder.eval(), _tokenizer_of(checkpoint) if tokenizer is None else load_tokenizer(tokenizer)


def load_adapted(checkpoint: Path) -> tuple[Decoder, LoRAConfig | None]:
    """The decoder of a checkpoint, with its adapter, if any, and the adapter's config.

    Raises:
        InputError: If the file is damaged or from another model, or the base weights are missing.
    """
    from experiment.runs.reading import of_another_package, read_checkpoint

    content = read_checkpoint(checkpoint)
    weights = {
        name.removeprefix("decoder."): weight
        for name, weight in content["state_dict"].items()
        if name.startswith("decoder.")
    }
    try:
        given = content["hyper_parameters"]
        config = DecoderConfig(**given["decoder"])
        if given.get("adapter", "full") == "full":
            decoder = make_decoder(config, Variant(**given.get("variant", {})))
            decoder.load_state_dict(weights)
            return decoder, None
        lora = LoRAConfig(**given["lora"])
        base = checkpoint.resolve().with_name(BASE)
        if not base.is_file():
            raise InputError(f"{checkpoint} holds only an adapter, and {base} is missing: copy the whole run")
        weights = {our_key(name): weight for name, weight in weights.items()}
        return adapted(config, load_adapted(base)[0].state_dict(), lora, weights), lora
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        other = of_another_package(checkpoint, "lm")
        raise InputError(
            f"{other} predict …" if other else f"{checkpoint} is not a checkpoint of the language model ({error})"
        ) from error


def save_base(decoder: Decoder, folder: Path) -> None:
    """Write a decoder's base weights, without adapters, next to its checkpoints unless they exist."""
    if (folder / BASE).is_file():
        return
    state = {f"decoder.{name}": weight.cpu() for name, weight in base_weights(decoder).items()}
    hyper_parameters = {"decoder": asdict(decoder.config)}
    partial = folder / f"{BASE}.partial"
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters, "global_step": 0}, partial)
    partial.replace(folder / BASE)


def _tokenizer_of(checkpoint: Path) -> StoryTokenizer:
    from experiment.runs.run import CONFIG
    from lm.data.module import TextDataModule

    run = checkpoint.resolve().parent.parent
    if (own := run / "tokenizer").is_dir():
        return load_tokenizer(own)
    file = run / CONFIG
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))["data"]
        named = {name: data[name] for name in ("path", "tokenizer", "vocab_size") if name in data}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{file} does not name the tokenizer of {checkpoint}; give it with --tokenizer") from error
    return TextDataModule(**named).tokenizer


def _tokenizer_beside(file: Path) -> Path:
    candidates = [llama2c_tokenizer_path(file), file.with_name("tokenizer.bin")]
    candidates += sorted(file.parent.glob("tok[0-9]*.bin"))  # as llama2.c names what it trains
    found = [candidate for candidate in candidates if candidate.is_file()]
    if not found:
        raise InputError(f"{file}: neither {' nor '.join(c.name for c in candidates)} exists; give --tokenizer")
    return found[0]
