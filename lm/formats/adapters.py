"""LoRA for the decoder, with PEFT's names for a Llama.

Our query, key and value share a matrix, as do gate and up; each part has its own A and B, so that adapters equal PEFT's
and are saved in PEFT's format for `LlamaForCausalLM`. `inject` uses the layers of experiment/nn/lora.py, `inject_peft`
PEFT's own; both draw the same numbers from the same seed.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from experiment.errors import InputError
from experiment.nn.adapter_files import PEFT_PREFIX, check_adapter, read_adapter, write_adapter
from experiment.nn.lora import LoRAEmbedding, LoRALinear, StackedLoRALinear
from experiment.nn.lora_config import ALL_LINEAR, LoRAConfig
from experiment.nn.lora_models import matching, train_only
from lm.formats.hugging_face import parameter_names, parameter_shape
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


def _modules(config: DecoderConfig) -> Iterator[tuple[str, list[str]]]:
    """Our modules with weights, and the Llama modules stacked in each, in Llama's order."""
    for ours, parts in parameter_names(config).items():
        if not config.tie_embeddings or ours != "head.weight":
            yield ours.removesuffix(".weight"), [part.removesuffix(".weight") for part in parts]
    if config.tie_embeddings:
        yield "head", ["lm_head"]


def peft_names(config: DecoderConfig) -> dict[str, str]:
    """Our modules, parts of stacked ones listed separately, and Llama's names."""
    names = {}
    for ours, parts in _modules(config):
        for part in parts:
            names[ours if len(parts) == 1 else f"{ours}.{_last(part)}"] = part
    return names


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def targeted(config: DecoderConfig, lora: LoRAConfig) -> set[str]:
    """The modules to adapt, by Llama's names; ValueError if a target matches nothing."""
    whole = _saved_whole(config, lora)  # modules trained in full get no adapter
    names = [part for ours, part in peft_names(config).items() if _last(part) in TARGETS and ours not in whole]
    if lora.target_modules == ALL_LINEAR:
        return {name for name in names if _last(name) not in ("embed_tokens", "lm_head")}
    return set(matching(names, lora.target_modules, f"the decoder: it has {', '.join(TARGETS)}"))


def _saved_whole(config: DecoderConfig, lora: LoRAConfig) -> list[str]:
    """Our modules that train in full; ValueError if a name matches none, only a part of one, or a tied matrix."""
    whole = {part: ours for ours, part in peft_names(config).items() if not ours.endswith("_proj")}
    if config.tie_embeddings:
        whole = {part: ours for part, ours in whole.items() if ours not in ("embedding", "head")}
    for target in lora.modules_to_save:
        if not any(part.endswith(target) for part in whole):  # as in PEFT
            there = ", ".join(sorted({_last(part) for part in whole}))
            raise ValueError(f"modules_to_save names {target!r}, which cannot train in full; expected some of {there}")
    return [ours for part, ours in whole.items() if part.endswith(tuple(lora.modules_to_save))]


def inject(decoder: Decoder, lora: LoRAConfig) -> None:
    """Put adapters on a decoder's targeted matrices, in place, and freeze the rest; errors as of `targeted`."""
    chosen, saved = targeted(decoder.config, lora), _saved_whole(decoder.config, lora)
    for ours, parts in list(_modules(decoder.config)):
        adapted = [part for part in parts if part in chosen]
        if not adapted:
            continue
        if ours == "head" and decoder.head is None:
            decoder.head = _tied_head(decoder)
        layer = decoder.get_submodule(ours)
        if isinstance(layer, nn.Embedding):
            new = LoRAEmbedding(layer, lora)
        elif len(parts) == 1:
            new = LoRALinear(layer, lora)
        else:
            rows = {_last(part): parameter_shape(decoder.config, f"{part}.weight")[0] for part in parts}
            new = StackedLoRALinear(layer, lora, rows, [_last(part) for part in adapted])
        parent, _, child = ours.rpartition(".")
        setattr(decoder.get_submodule(parent), child, new)
    train_only(decoder, [])
    for ours in saved:
        decoder.get_submodule(ours).requires_grad_(True)


def adapt(decoder: Decoder, adapter: str, lora: LoRAConfig, adapter_weights: str | None) -> LoRAConfig:
    """Put adapters on a decoder, in place: with our layers (``lora``) or PEFT's (``peft``).

    Args:
        decoder: Plain.
        adapter: Which layers to use.
        lora: The adapter config.
        adapter_weights: A folder of `save_adapter` or PEFT to start from; it overrides all of lora except dropout.

    Returns:
        The config that was used.

    Raises:
        InputError: Targets or weights do not match the decoder.
    """
    trained = None
    try:
        if adapter_weights is not None:
            dropout = lora.lora_dropout
            lora, trained = read_decoder_adapter(decoder, adapter_weights)
            lora = replace(lora, lora_dropout=dropout)
        (inject if adapter == "lora" else inject_peft)(decoder, lora)
    except ValueError as error:
        raise InputError(f"model.{'lora' if trained is None else 'adapter_weights'}: {error}") from error
    if trained is not None:
        load_trained(decoder, trained)
    return lora


def _tied_head(decoder: Decoder) -> nn.Linear:
    weight = decoder.embedding.weight
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head


class _Unstacked(nn.Module):
    """The matrices of a stacked layer as separate layers, as PEFT needs them."""

    def __init__(self, layer: nn.Linear, rows: dict[str, int]) -> None:
        super().__init__()
        for (name, size), weight in zip(rows.items(), layer.weight.detach().split(list(rows.values())), strict=True):
            part = nn.Linear(layer.in_features, size, bias=False, device="meta")
            part.weight = nn.Parameter(weight.clone())
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def inject_peft(decoder: Decoder, lora: LoRAConfig) -> None:
    """As `inject`, with PEFT's own layers."""
    import peft

    config = decoder.config
    chosen, saved = targeted(config, lora), _saved_whole(config, lora)
    if "lm_head" in chosen and decoder.head is None:
        decoder.head = _tied_head(decoder)
    for ours, parts in list(_modules(config)):
        if len(parts) > 1:
            rows = {_last(part): parameter_shape(config, f"{part}.weight")[0] for part in parts}
            parent, _, child = ours.rpartition(".")
            setattr(decoder.get_submodule(parent), child, _Unstacked(decoder.get_submodule(ours), rows))
    options = {name: getattr(lora, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
    targets = [ours for ours, part in peft_names(config).items() if part in chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a tied embedding, which is not merged here
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                target_modules=targets,
                modules_to_save=saved or None,
                init_lora_weights=lora.init_lora_weights,
                **options,
            ),
            decoder,
        )


def our_key(key: str) -> str:
    """Our name of a parameter in a decoder with PEFT's layers."""
    key = key.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return key.replace("modules_to_save.default.", "").replace(".default", "")


def base_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The state dict of the decoder without the adapters, ours or PEFT's."""
    tied_head = "head." if decoder.config.tie_embeddings else None
    parts: dict[str, list[Tensor]] = {}
    for key, weight in decoder.named_parameters(remove_duplicate=True):
        if "lora_" in key or "modules_to_save" in key or (tied_head and key.startswith(tied_head)):
            continue
        key = key.replace("base_layer.", "").replace("original_module.", "")
        stacked = key.split(".")[-2]
        if stacked.endswith("_proj"):
            key = key.replace(f"{stacked}.", "")
        parts.setdefault(key, []).append(weight.detach())
    return {key: weights[0] if len(weights) == 1 else torch.cat(weights) for key, weights in parts.items()}


def trained_weights(decoder: Decoder) -> dict[str, Tensor]:
    """The trained weights under our names, for our adapters and PEFT's."""
    return {our_key(key): weight for key, weight in decoder.named_parameters() if weight.requires_grad}


@torch.no_grad()
def merged(decoder: Decoder, lora: LoRAConfig) -> Decoder:
    """A plain decoder with the logits of the adapted one, in eval mode, with its own weights; untied if the
    embedding or the head of a tied model is adapted."""
    if any(isinstance(module, _Unstacked) for module in decoder.modules()):  # by PEFT
        decoder = adapted(decoder.config, base_weights(decoder), lora, trained_weights(decoder))
    untied = decoder.config.tie_embeddings and (
        decoder.head is not None or isinstance(decoder.embedding, LoRAEmbedding)
    )
    config = replace(decoder.config, tie_embeddings=False) if untied else decoder.config
    weights = {}
    for ours in parameter_names(config):
        name = ours.removesuffix(".weight")
        if name == "head" and decoder.head is None:
            weights[ours] = decoder.embedding.weight
        else:
            module = decoder.get_submodule(name)
            weights[ours] = module.adapted_weight() if hasattr(module, "adapted_weight") else module.weight
    state = base_weights(decoder) | weights
    with torch.random.fork_rng(devices=[]):
        plain = Decoder(config)
    plain.load_state_dict(state)
    return plain.to(decoder.norm.weight.device).eval()


def adapted(config: DecoderConfig, base: dict[str, Tensor], lora: LoRAConfig, trained: dict[str, Tensor]) -> Decoder:
    """A decoder with our adapters, from its base and trained weights; ValueError if they do not fit."""
    with torch.random.fork_rng(devices=[]):
        decoder = Decoder(config)
        decoder.load_state_dict(base)
        inject(decoder, lora)
    check_adapter(trained, trained_weights(decoder), "the checkpoint")
    load_trained(decoder, trained)
    return decoder


@torch.no_grad()
def load_trained(decoder: Decoder, trained: dict[str, Tensor]) -> None:
    """Load `trained_weights` into a decoder with our adapters or PEFT's."""
    for name, parameter in trained_weights(decoder).items():
        parameter.copy_(trained[name])


def _peft_key(key: str, names: dict[str, str]) -> str:
    module, separator, parameter = key.partition(".lora_")
    if not separator:
        module, _, parameter = key.rpartition(".")
        separator = "."
    return f"{PEFT_PREFIX}{names[module]}{separator}{parameter}"


def save_adapter(decoder: Decoder, lora: LoRAConfig, folder: str | Path, base_model: str | None = None) -> None:
    """Write the adapter in PEFT's format for `LlamaForCausalLM`; `PeftModel.from_pretrained` reads it."""
    names = peft_names(decoder.config)
    weights = {_peft_key(key, names): weight for key, weight in trained_weights(decoder).items()}
    write_adapter(weights, lora, folder, base_model, task_type="CAUSAL_LM")


def read_decoder_adapter(decoder: Decoder, folder: str | Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """An adapter written by PEFT or `save_adapter`: its config, and its weights under our names.

    Args:
        decoder: Plain, with the shape of the adapted one; not changed.
        folder: With adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: It cannot be read, or belongs to another model.
    """
    lora, weights, _ = read_adapter(folder)
    with torch.device("meta"):
        expected = Decoder(decoder.config)
    inject(expected, lora)
    names = peft_names(decoder.config)
    keys = {_peft_key(key, names): key for key in trained_weights(expected)}
    check_adapter(weights, {key: expected.get_parameter(ours) for key, ours in keys.items()}, folder)
    return lora, {keys[key]: weight.float() for key, weight in weights.items()}
