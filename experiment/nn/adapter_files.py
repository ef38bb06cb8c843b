"""Adapter files in PEFT's format: `PeftModel.from_pretrained` reads what we save, and we read what PEFT saves.

A folder with adapter_config.json (a LoRAConfig, whose fields have PEFT's names) and adapter_model.safetensors (the
low-rank weights and the modules trained in full).
"""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from experiment.nn.lora_config import LoRAConfig
from experiment.nn.lora_models import inject_lora, lora_layers, saved_whole

PEFT_PREFIX = "base_model.model."  # PEFT's path to the adapted model, part of every key in its files


def adapter_state_dict(model: nn.Module, modules_to_save: list[str]) -> dict[str, Tensor]:
    """The adapters' weights and the modules saved whole, under PEFT's keys."""
    wanted = tuple(f"{name}.lora_" for name in lora_layers(model))
    whole = saved_whole(model, modules_to_save)
    return {
        PEFT_PREFIX + key: value
        for key, value in model.state_dict().items()
        if key.startswith(wanted) or key.rpartition(".")[0] in whole
    }


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    folder: str | Path,
    base_model: str | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the adapter of a classifier adapted by `inject_lora` with this config; see `write_adapter`."""
    write_adapter(adapter_state_dict(model, config.modules_to_save), config, folder, base_model, metadata)


def write_adapter(
    weights: dict[str, Tensor],
    config: LoRAConfig,
    folder: str | Path,
    base_model: str | None = None,
    metadata: dict[str, str] | None = None,
    task_type: str = "SEQ_CLS",
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; `PeftModel.from_pretrained` reads them.

    Args:
        weights: the adapters' weights and those of modules saved whole, under PEFT's keys.
        config: the adapter's config; `modules_to_save` names every module saved whole.
        folder: made if it is missing.
        base_model: name or folder of the model that was adapted.
        metadata: strings kept in the head of the safetensors file.
        task_type: PEFT's, such as CAUSAL_LM.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_model}
    content |= asdict(config) | {"bias": "none", "inference_mode": True}
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"} | (metadata or {}))
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(folder: str | Path) -> LoRAConfig:
    """The LoRAConfig of an adapter's folder, PEFT's or ours.

    Raises:
        ValueError: there is no adapter, or it uses a feature that is not implemented here.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not an adapter_config.json written by PEFT: {error}") from error
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only LORA adapters can be read")
    known = {f.name for f in fields(LoRAConfig)}
    harmless = {"peft_type", "task_type", "base_model_name_or_path"}
    harmless |= {"inference_mode", "peft_version", "revision"}
    # PEFT's other fields turn on variants; each is off if it is empty or has one of these values.
    off = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
    foreign = {k: v for k, v in content.items() if k not in known | harmless and v and off.get(k) != v}
    if foreign:
        raise ValueError(f"{path}: not supported here: {', '.join(f'{k}={v!r}' for k, v in foreign.items())}")
    values = {key: content[key] for key in known & content.keys()}
    values["modules_to_save"] = values.get("modules_to_save") or []
    if not isinstance(values.get("init_lora_weights", True), bool):
        # PEFT's other initializations result in the same form.
        values["init_lora_weights"] = True
    try:
        return LoRAConfig(**values)
    except TypeError as error:
        raise ValueError(f"{path} holds a value of the wrong type: {error}") from error


def read_adapter(folder: str | Path) -> tuple[LoRAConfig, dict[str, Tensor], dict[str, str]]:
    """An adapter in PEFT's format: how it was trained, its weights under PEFT's keys, and their file's metadata.

    Raises:
        ValueError: there is no adapter, it cannot be read, or its files disagree.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as safetensors: {error}") from error
    ranks = {value.shape[0] for key, value in weights.items() if key.endswith(("lora_A.weight", "lora_embedding_A"))}
    if ranks != {config.r}:
        raise ValueError(f"{path} holds weights of rank {sorted(ranks)}; adapter_config.json says {config.r}")
    # PEFT saves the original weights of an adapted embedding, too.
    return config, {key: value for key, value in weights.items() if ".base_layer." not in key}, metadata


def check_adapter(weights: dict[str, Tensor], expected: dict[str, Tensor], folder: str | Path) -> None:
    """Check that an adapter has exactly the weights that a model needs; both under PEFT's keys.

    Raises:
        ValueError: a weight is missing, unexpected, or of another shape.
    """
    path = Path(folder) / "adapter_model.safetensors"
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more: an adapter for other layers")
    if unexpected := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{path} holds {unexpected[0]}, unknown to this model: an adapter for another base model")
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(value.shape)}, this model needs "
                f"{tuple(expected[key].shape)}: an adapter with another rank or base model"
            )


def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, str]:
    """Load an adapter in PEFT's format into a model; a plain model is adapted first.

    Returns:
        The metadata of the weights' file.

    Raises:
        ValueError: the adapter does not fit: another base model, rank, variant or set of layers.
    """
    config, weights, metadata = read_adapter(folder)
    # PEFT names "score" too, for models that call their classifier so.
    names = [name for name, _ in model.named_modules()]
    present = [target for target in config.modules_to_save if any(name.endswith(target) for name in names)]
    if not lora_layers(model):
        inject_lora(model, replace(config, modules_to_save=present))
    check_adapter(weights, adapter_state_dict(model, present), folder)
    if any(layer.scaling != config.scaling for layer in lora_layers(model).values()):
        raise ValueError(
            f"{folder} holds an adapter trained at scale {config.scaling:g}: set lora_alpha and use_rslora to match"
        )
    model.load_state_dict({key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}, strict=False)
    return metadata
