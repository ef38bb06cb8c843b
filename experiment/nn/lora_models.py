"""LoRA for a whole model: which layers are adapted, what trains, and merging all updates at once."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from experiment.nn.lora import LoRALinear
from experiment.nn.lora_config import ALL_LINEAR, LoRAConfig


def inject_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Replace every targeted layer by a LoRALinear and freeze everything except adapters and modules_to_save.

    Args:
        model: any module; changed in place.
        config: `target_modules` are matched against the names of `named_modules()`, whole or by dotted suffix:
            "query" matches "encoder.layer.0.attention.self.query".

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        ValueError: a target matches nothing, or not an `nn.Linear`; the model is adapted already.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA adapters already: inject them once, into the plain model")
    whole = saved_whole(model, config.modules_to_save)  # as in PEFT, modules trained in full get no adapter
    names = [name for name in target_names(model, config.target_modules) if name not in whole]
    if not names:
        raise ValueError("modules_to_save trains all of target_modules in full: nothing is left to adapt")
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"target_modules matches {name}, a {type(layer).__name__}: LoRA adapts linear layers; "
                f"here these are {_linear_suffixes(model)}"
            )
        setattr(model.get_submodule(parent), child, LoRALinear(layer, config))
    train_only(model, config.modules_to_save)
    return names


def target_names(model: nn.Module, targets: list[str] | str) -> list[str]:
    """The names of the target modules in the model's order: matched by name, dotted suffix, or one pattern.

    Raises:
        ValueError: a target matches nothing.
    """
    if targets == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    there = f"{type(model).__name__}: its linear layers end in {_linear_suffixes(model)}"
    return matching([name for name, _ in model.named_modules()], targets, there)


def matching(names: Sequence[str], targets: list[str] | str, there: str) -> list[str]:
    """The names that are targets: matched by name, dotted suffix, or one pattern.

    Args:
        names: Names of modules.
        targets: As in `LoRAConfig`, except all-linear.
        there: For the message: what the names belong to, and the available names.

    Raises:
        ValueError: a target matches nothing.
    """
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules {targets!r} is not a regular expression: {error}") from error
        missing = []
        found = {name for name in names if pattern.fullmatch(name)}
    else:
        matches = {target: {name for name in names if is_named(name, target)} for target in targets}
        missing = [target for target, named in matches.items() if not named]
        found = set().union(*matches.values())
    if missing or not found:
        raise ValueError(f"target_modules {', '.join(missing) or repr(targets)} matches no layer of {there}")
    return [name for name in names if name in found]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def train_only(model: nn.Module, modules_to_save: list[str]) -> None:
    """Freeze everything except the adapters' weights and the named modules.

    Raises:
        ValueError: a name that matches no module.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part.startswith("lora_") for part in name.split(".")))
    whole = saved_whole(model, modules_to_save)
    for name, module in model.named_modules():
        if name in whole:
            module.requires_grad_(True)


def saved_whole(model: nn.Module, modules_to_save: list[str]) -> set[str]:
    """Names of the modules that are trained and saved in full, and of their submodules.

    A name ends in one of `modules_to_save`, as in PEFT: DistilBERT's `pre_classifier` goes with its `classifier`.

    Raises:
        ValueError: a name matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    whole: set[str] = set()
    for target in modules_to_save:
        tops = [name for name in names if name.endswith(target)]
        if not tops:
            there = sorted({name for name in names if name and name.count(".") <= 1})
            raise ValueError(f"modules_to_save names {target!r}, which this model lacks; it has {', '.join(there)}")
        whole |= {name for name in names if any(f"{name}.".startswith(f"{top}.") for top in tops)}
    return whole


def merge(model: nn.Module) -> None:
    """Merge every adapter into its layer's weight: the plain model's speed, the adapted model's outputs."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit-identically."""
    for layer in lora_layers(model).values():
        layer.unmerge()


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model runs without its low-rank updates, merged or not.

    Modules trained in full (a classifier head) keep their trained weights: there is no second copy of them.
    """
    layers = lora_layers(model).values()
    before = [(layer, layer.enabled, layer.merged) for layer in layers]
    for layer in layers:
        layer.unmerge()
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled, merged in before:
            layer.enabled = enabled
            if merged:
                layer.merge()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, each shared tensor counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def is_named(name: str, target: str) -> bool:
    """Whether a module's name equals the target or ends in it as a dotted suffix."""
    return name == target or name.endswith("." + target)


def _linear_suffixes(model: nn.Module) -> str:
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear}))


def fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """A fingerprint of the frozen weights, from the first values of each."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
