"""LoRA by hand: low-rank adapters for any model made of `nn.Linear`, in plain torch.

A frozen layer `y = x W^T + b` gets a trainable update of low rank (Hu et al. 2021, https://arxiv.org/abs/2106.09685):

    y = x W^T + b + s (dropout(x) A^T) B^T      A: (r, in), B: (out, r), s = lora_alpha / r

B starts at zero, so training begins at the pretrained model; r (in + out) numbers are trained instead of
in x out. The product is taken through the r-dimensional middle: B A is never formed while training, and no
gradient is computed for W. Two refinements by option:

- rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): s = lora_alpha / sqrt(r), so that the size of
  the update does not shrink as r grows.
- DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): W' = m (W + s B A) / ||W + s B A||, the norm
  taken over each output's row; m (out,) is trained and starts at ||W||. The norm counts as a constant in
  the gradient (their section 4.3).

    inject_lora(model, LoRAConfig(r=8, target_modules=["query", "key", "value"]))   # freezes all the rest
    ...train...
    save_adapter(model, config, "adapter")      # PeftModel.from_pretrained(base, "adapter") reads it
    merge(model)                                # W' takes the place of W: no cost at inference
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PEFT_PREFIX = "base_model.model."  # PEFT's path to the adapted model, part of every key in its files


@dataclass(frozen=True)
class LoRAConfig:
    """What is adapted, and how; the field names are PEFT's.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: numerator of the scale s; above 0.
        lora_dropout: probability of dropping an element of the adapter's input, in [0, 1).
        target_modules: linear layers to adapt: names or dotted suffixes of names, or one regular expression
            that matches whole names.
        modules_to_save: modules trained in full beside the adapters, by name or suffix.
        use_rslora: scale by lora_alpha / sqrt(r).
        use_dora: train direction and magnitude of the weights apart.
        init_lora_weights: True: B is zero. False: B is random as A is, which disturbs the pretrained model
            from the first step; here for the comparison.

    Raises:
        ValueError: a value out of range.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["query", "key", "value"])
    modules_to_save: list[str] = field(default_factory=lambda: ["classifier"])
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool = True

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r is {self.r}: the rank of a LoRA update must be at least 1, usually 4 to 64")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}: it must be above 0; usual is 2 r")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: it must be in [0, 1)")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name at least one linear layer, for example query")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update: W' = W + (lora_alpha / r) B A.

    Args:
        base_layer: the layer to adapt, weight W (out, in); it is kept as it is, and frozen.
        config: rank, scale, dropout and variant.

    Shapes: forward takes (..., in) and returns (..., out). `lora_A.weight` (r, in) is Kaiming-uniform,
    `lora_B.weight` (out, r) is zero, `lora_magnitude_vector` (out,) exists with DoRA only.

    Example:
        >>> layer = LoRALinear(nn.Linear(384, 384), LoRAConfig(r=8))
        >>> layer(torch.randn(2, 10, 384)).shape
        torch.Size([2, 10, 384])
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = config.scaling
        self.enabled = True
        self._base_weight: Tensor | None = None  # W itself, while the update is merged into base_layer
        self.lora_dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        # Random numbers are drawn on the CPU and in PEFT's order (A, B, A again): one seed, one A, in both.
        self.lora_A = nn.Linear(base_layer.in_features, config.r, bias=False)
        self.lora_B = nn.Linear(config.r, base_layer.out_features, bias=False)
        if config.init_lora_weights:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B.weight)
        self.lora_A.to(base_layer.weight)
        self.lora_B.to(base_layer.weight)
        self.register_parameter("lora_magnitude_vector", None)
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(self._row_norm())

    @property
    def merged(self) -> bool:
        return self._base_weight is not None

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        if self.merged or not self.enabled:
            return result
        dropped = self.lora_dropout(x)
        update = self.lora_B(self.lora_A(dropped))
        if self.lora_magnitude_vector is None:
            return result + update * self.scaling
        # y = m / ||W + s B A|| (x W^T + s x A^T B^T) + b, written as an addition to the base layer's result.
        # With dropout, PEFT lets the rescaled x W^T see the dropped input too; so do we.
        scale = (self.lora_magnitude_vector / self._row_norm()).view(1, -1)
        if self.training and not isinstance(self.lora_dropout, nn.Identity):
            projected = F.linear(dropped, self.base_layer.weight)
        else:
            projected = result if self.base_layer.bias is None else result - self.base_layer.bias
        return result + ((scale - 1) * projected + scale * update * self.scaling)

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (out, in): W + s B A, with DoRA rescaled row by row to the trained magnitudes."""
        weight = self._direction()
        if self.lora_magnitude_vector is not None:
            weight *= (self.lora_magnitude_vector / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
        return weight

    def merge(self) -> None:
        """Put W' in the place of W. Merging twice is merging once; costs a copy of W, kept to restore it."""
        if not self.merged:
            merged, self._base_weight = self.adapted_weight(), self.base_layer.weight.data
            self.base_layer.weight.data = merged

    def unmerge(self) -> None:
        """Put W back, the same to the bit. Unmerging twice is unmerging once."""
        if self.merged:
            self.base_layer.weight.data, self._base_weight = self._base_weight, None

    def _direction(self) -> Tensor:
        weight = self._base_weight if self.merged else self.base_layer.weight
        return weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def _row_norm(self) -> Tensor:
        return torch.linalg.norm(self._direction(), dim=1)


# ---------------------------------------------------------------- adapting a whole model


def inject_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Put a LoRALinear in the place of every targeted layer and freeze all but adapters and modules to save.

    Args:
        model: any module; changed in place.
        config: `target_modules` and `modules_to_save` are matched against the names of `named_modules()`,
            whole or by dotted suffix: "query" matches "encoder.layer.0.attention.self.query".

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        ValueError: a target matches nothing, or no `nn.Linear`; the model is adapted already.
    """
    if lora_layers(model):
        raise ValueError("the model has LoRA adapters already: inject them once, into the plain model")
    names = target_names(model, config.target_modules)
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
    """The names, in the model's order, of the modules that are targets: by name, dotted suffix, or one pattern.

    Raises:
        ValueError: a target matches nothing.
    """
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules {targets!r} is no regular expression: {error}") from error
        missing = []
        names = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
    else:
        matches = {target: set(_modules_named(model, target)) for target in targets}
        missing = [target for target, found in matches.items() if not found]
        found = set().union(*matches.values())
        names = [name for name, _ in model.named_modules() if name in found]
    if missing or not names:
        raise ValueError(
            f"target_modules {', '.join(missing) or repr(targets)} matches no layer of "
            f"{type(model).__name__}: its linear layers end in {_linear_suffixes(model)}"
        )
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def train_only(model: nn.Module, modules_to_save: list[str]) -> None:
    """Freeze everything but the adapters' own weights and the named modules.

    Raises:
        ValueError: a name that matches no module.
    """
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.startswith("lora_"))
    for target in modules_to_save:
        modules = _modules_named(model, target)
        if not modules:
            there = sorted({name for name, _ in model.named_modules() if name and name.count(".") <= 1})
            raise ValueError(
                f"modules_to_save names {target!r}, which this model lacks; it has {', '.join(there)}"
            )
        for module in modules.values():
            module.requires_grad_(True)


def merge(model: nn.Module) -> None:
    """Merge every adapter into its layer's weight: the plain model's speed, the adapted model's outputs."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, to the bit."""
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


def _modules_named(model: nn.Module, target: str) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name == target or name.endswith("." + target)}


def _linear_suffixes(model: nn.Module) -> str:
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear}))


# ------------------------------------------------------------------- PEFT's file format


def adapter_state_dict(model: nn.Module, modules_to_save: list[str]) -> dict[str, Tensor]:
    """The adapters' weights and the modules saved whole, under PEFT's keys."""
    state = model.state_dict()
    wanted = [f"{name}.lora_" for name in lora_layers(model)]
    wanted += [f"{name}." for target in modules_to_save for name in _modules_named(model, target)]
    return {PEFT_PREFIX + key: value for key, value in state.items() if key.startswith(tuple(wanted))}


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    folder: str | Path,
    base_model: str | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; `PeftModel.from_pretrained` reads them.

    Args:
        model: a model `inject_lora` adapted with this config.
        folder: made if it is missing.
        base_model: name or folder of the model that was adapted.
        metadata: strings kept in the head of the safetensors file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": base_model}
    content |= asdict(config) | {"bias": "none", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = adapter_state_dict(model, config.modules_to_save)
    weights = {key: value.contiguous() for key, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"} | (metadata or {}))


def read_adapter_config(folder: str | Path) -> LoRAConfig:
    """The LoRAConfig of an adapter's folder, PEFT's or ours.

    Raises:
        ValueError: no adapter there, or one that uses what this file does not implement.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no adapter_config.json as PEFT writes it: {error}") from error
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only LORA adapters can be read")
    known = {f.name for f in fields(LoRAConfig)}
    harmless = {"peft_type", "task_type", "base_model_name_or_path"}
    harmless |= {"inference_mode", "peft_version", "revision"}
    # PEFT's other fields switch on variants; each is off while it is empty or at one of these values.
    off = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
    foreign = {k: v for k, v in content.items() if k not in known | harmless and v and off.get(k) != v}
    if foreign:
        raise ValueError(f"{path}: not supported here: {', '.join(f'{k}={v!r}' for k, v in foreign.items())}")
    values = {key: content[key] for key in known & content.keys()}
    values["modules_to_save"] = values.get("modules_to_save") or []
    if not isinstance(values.get("init_lora_weights", True), bool):
        # PEFT's other ways to start end in the same form.
        values["init_lora_weights"] = True
    try:
        return LoRAConfig(**values)
    except TypeError as error:
        raise ValueError(f"{path} holds a value of the wrong type: {error}") from error


def load_adapter(model: nn.Module, folder: str | Path) -> dict[str, str]:
    """Read an adapter in PEFT's format into a model, adapting it first where it is still plain.

    Returns:
        The metadata of the weights' file.

    Raises:
        ValueError: the adapter does not fit: another base model, rank, variant or set of layers.
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
    ranks = {value.shape[0] for key, value in weights.items() if key.endswith("lora_A.weight")}
    if ranks != {config.r}:
        raise ValueError(f"{path} holds weights of rank {sorted(ranks)}; adapter_config.json says {config.r}")
    # PEFT names "score" too, for models that call their classifier so.
    present = [name for name in config.modules_to_save if _modules_named(model, name)]
    if not lora_layers(model):
        inject_lora(model, replace(config, modules_to_save=present))
    expected = adapter_state_dict(model, present)
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more: an adapter of other layers")
    if unexpected := sorted(weights.keys() - expected.keys()):
        raise ValueError(
            f"{path} holds {unexpected[0]}, unknown to this model: an adapter of another base model"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(value.shape)}, this model needs "
                f"{tuple(expected[key].shape)}: an adapter of another rank or base model"
            )
    if any(layer.scaling != config.scaling for layer in lora_layers(model).values()):
        raise ValueError(
            f"{path} was trained at scale {config.scaling:g}: set lora_alpha and use_rslora alike"
        )
    weights = {key.removeprefix(PEFT_PREFIX): value for key, value in weights.items()}
    model.load_state_dict(weights, strict=False)
    return metadata
