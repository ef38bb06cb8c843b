"""How a story is decoded."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

WeightDtype = Literal["float32", "bfloat16", "int8"]


@dataclass
class GenerationConfig:
    """How to choose the next token, and when to stop.

    Args:
        max_new_tokens: Longest continuation, in tokens.
        temperature: Divides the logits; 0 decodes greedily.
        top_k: Keep the k most likely tokens.
        top_p: Keep the most likely tokens until their probabilities sum to p (nucleus sampling, Holtzman et al. 2020,
            arXiv:1904.09751).
        min_p: Keep tokens at least this fraction as likely as the most likely (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: Above 1, makes tokens of prompt and story less likely (Keskar et al. 2019,
            arXiv:1909.05858).
        seed: Of sampling.
        use_cache: Keep keys and values; otherwise the whole sequence is recomputed for each token.
        sliding_window: Beyond the decoder's context continue with the newest half of it, instead of stopping.
        stop: Strings that end a story as soon as they occur in its new text.
        weight_dtype: Type of the decoder's matrices while decoding on a CPU: bfloat16 and int8 read a half and a
            quarter of the bytes and change the story a little (see quantization.py); null leaves them.
        compile: Compile the step of one token: fewer and faster kernels, the same tokens. Needs a C++ compiler (Triton
            on a GPU), the cache, and half a minute; on a CPU the code for one story at a time is cached on disk.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If a number is out of range.
    """

    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    use_cache: bool = True
    sliding_window: bool = False
    stop: list[str] = field(default_factory=list)
    weight_dtype: WeightDtype | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        whole, optional = "a whole number, at least 1", "or null for no limit"
        for name, valid, expected in (
            ("max_new_tokens", lambda n: isinstance(n, int) and n >= 1, whole),
            ("temperature", lambda t: 0 <= t < math.inf, "0 (greedy) or a positive number"),
            (
                "top_k",
                lambda k: k is None or (isinstance(k, int) and k >= 1),
                f"{whole}, {optional}",
            ),
            ("top_p", lambda p: p is None or 0 < p <= 1, f"a probability in (0, 1], {optional}"),
            ("min_p", lambda p: p is None or 0 <= p <= 1, f"a fraction in [0, 1], {optional}"),
            ("repetition_penalty", lambda r: 0 < r < math.inf, "a positive number; 1 turns it off"),
            ("seed", lambda seed: isinstance(seed, int), "a whole number"),
            ("stop", lambda stop: "" not in stop, "no empty string, which would stop every story at once"),
            ("weight_dtype", lambda d: d in (None, *get_args(WeightDtype)), "float32, bfloat16, int8 or null"),
            ("compile", lambda compile: self.use_cache or not compile, "false without a cache; set use_cache"),
        ):
            problem = f"{name}={(value := getattr(self, name))!r}: expected {expected}"
            try:
                if not valid(value):
                    raise ValueError(problem)
            except TypeError:  # no number
                raise TypeError(problem) from None
