"""The configuration of LoRA."""

import math
from dataclasses import dataclass, field

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """What LoRA adapts, and how; the field names are PEFT's.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: numerator of the scale s; above 0.
        lora_dropout: probability of dropping an element of the adapter's input, in [0, 1).
        target_modules: linear layers to adapt: names or dotted suffixes of names, one regular expression that
            matches whole names, or all-linear, which is every linear layer except a language model's head.
        modules_to_save: modules trained in full besides the adapters, by name suffix.
        use_rslora: scale by lora_alpha / sqrt(r).
        use_dora: train direction and magnitude of the weights separately.
        init_lora_weights: True: B is zero. False: B is random as A is, which disturbs the pretrained model
            from the first step; for the ablation only.

    Raises:
        ValueError: a value out of range.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: list[str] | str = ALL_LINEAR
    modules_to_save: list[str] = field(default_factory=list)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool = True

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r is {self.r}: the rank of a LoRA update must be at least 1, usually 4 to 64")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}: it must be above 0, usually 2 r")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}: it must be in [0, 1)")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name at least one linear layer, for example query")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
