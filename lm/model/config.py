"""The shape of a decoder, variants of it for comparisons, and how it decodes."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

WeightDtype = Literal["float32", "bfloat16", "int8"]


@dataclass
class DecoderConfig:
    """The whole shape of a decoder.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the SwiGLU.
        num_layers: Number of blocks.
        num_heads: Number of query heads; the head size `hidden_size / num_heads` must be even.
        num_kv_heads: Number of key and value heads, a divisor of `num_heads` (grouped heads, Ainslie et al.
            2023, arXiv:2305.13245); None means as many as query heads.
        max_sequence_length: Context in tokens; longer sequences are refused. The command line's default is
            `data.sequence_length`.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Added to the mean square before the square root.
        tie_embeddings: Whether the output head is the embedding matrix.
        dropout: Probability of dropping an element of the embeddings and of each residual branch in training.
        query_key_norm: RMSNorm of each head's queries and keys before rotation, as in Qwen3 (arXiv:2505.09388): the
            model exports as a Qwen3, not as a LLaMA.
        value_residual: Each later layer mixes its values with the first layer's by two learned weights that start at
            0.5 (Zhou et al. 2024, arXiv:2410.17897): not exportable.

    Raises:
        ValueError: If the numbers are inconsistent.
    """

    vocab_size: int = 32768
    hidden_size: int = 288
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int | None = None
    max_sequence_length: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0
    query_key_norm: bool = False
    value_residual: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not isinstance(value, bool) and name != "dropout" and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: expected a positive number; give one")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; choose a divisor"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads = {self.head_dim} is odd, but rotary positions turn pairs; "
                "choose hidden_size and num_heads with an even quotient"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: expected a probability in [0, 1); 0 turns it off")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, also if `num_kv_heads` is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclass
class Variant:
    """Changes to the decoder; by default none.

    Attributes:
        positions: ``rotary``; ``learned``, a vector for each position that is added to the embedding (Vaswani et al.
            2017, arXiv:1706.03762); or ``none``, where order comes from the causal mask alone (Kazemnejad et al. 2023,
            arXiv:2305.19466).
        norm: ``rms``; ``layer``, LayerNorm without a bias (Ba et al. 2016, arXiv:1607.06450); or ``none``. Norms of
            queries and keys stay.
        norm_place: ``pre``, branch(norm(x)); or ``post``, norm(x + branch(x)) without a last norm, as in the first
            transformer.
        feed_forward: ``swiglu``; or ``silu`` or ``gelu`` without a gate, 1.5 times as wide for equal parameters.
        scaled_residuals: Initialize the last matrix of each branch smaller by sqrt(2 num_layers) (Radford et al. 2019).
    """

    positions: Literal["rotary", "learned", "none"] = "rotary"
    norm: Literal["rms", "layer", "none"] = "rms"
    norm_place: Literal["pre", "post"] = "pre"
    feed_forward: Literal["swiglu", "silu", "gelu"] = "swiglu"
    scaled_residuals: bool = True

    @property
    def changed(self) -> dict[str, object]:
        """The changed parts, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}


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
        repetition_penalty: If above 1, makes tokens of prompt and story less likely (Keskar et al. 2019,
            arXiv:1909.05858).
        seed: Seed of sampling, so that a story can be repeated.
        use_cache: Cache keys and values; otherwise the whole sequence is recomputed for each token.
        sliding_window: At the end of the context, continue with its newest half instead of stopping.
        stop: Strings that end a story as soon as they occur in its new text.
        weight_dtype: Type of the decoder's matrices while decoding on a CPU: bfloat16 and int8 read a half and a
            quarter of the bytes and change the story a little (see quantization.py); null keeps the type.
        compile: Compile the one-token step: fewer and faster kernels, the same tokens. Needs a C++ compiler (Triton
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
            ("top_k", lambda k: k is None or (isinstance(k, int) and k >= 1), f"{whole}, {optional}"),
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
            except TypeError:  # not a number
                raise TypeError(problem) from None
