"""The shape of a decoder, and variants of it for comparisons."""

import math
from dataclasses import dataclass, fields
from typing import Literal


@dataclass
class DecoderConfig:
    """The whole shape of a decoder.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the SwiGLU.
        num_layers: Number of blocks.
        num_heads: Number of query heads; `hidden_size / num_heads` is the size of a head and must be even.
        num_kv_heads: Number of key and value heads, a divisor of `num_heads` (grouped heads, Ainslie et al.
            2023, arXiv:2305.13245); None means as many as query heads.
        max_sequence_length: Context in tokens; longer sequences are refused. The command line's default is
            `data.sequence_length`.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Added to the mean square before the root.
        tie_embeddings: Whether the output head is the embedding matrix.
        dropout: Probability of dropping an element of the embeddings and of each residual branch in training.
        query_key_norm: RMSNorm of each head's queries and keys before rotation, as in Qwen3 (arXiv:2505.09388): the
            model exports as a Qwen3, not as a LLaMA.
        value_residual: Each later layer mixes its values with the first layer's by two learned weights that start at
            0.5 (Zhou et al. 2024, arXiv:2410.17897): not exportable.

    Raises:
        ValueError: If the numbers do not make a decoder.
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
        """Key and value heads, also where `num_kv_heads` is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclass
class Variant:
    """What differs from the decoder; by default nothing.

    Attributes:
        positions: ``rotary``; ``learned``, a vector for each position that is added to the embedding (Vaswani et al.
            2017, arXiv:1706.03762); or ``none``, where the causal mask alone tells order (Kazemnejad et al. 2023,
            arXiv:2305.19466).
        norm: ``rms``; ``layer``, LayerNorm without a bias (Ba et al. 2016, arXiv:1607.06450); or ``none``. Norms of
            queries and keys stay.
        norm_place: ``pre``, branch(norm(x)); or ``post``, norm(x + branch(x)) without a last norm, as in the first
            transformer.
        feed_forward: ``swiglu``; or ``silu`` or ``gelu`` without a gate, 1.5 times as wide for as many parameters.
        scaled_residuals: Initialise the last matrix of each branch smaller by sqrt(2 num_layers) (Radford et al. 2019).
    """

    positions: Literal["rotary", "learned", "none"] = "rotary"
    norm: Literal["rms", "layer", "none"] = "rms"
    norm_place: Literal["pre", "post"] = "pre"
    feed_forward: Literal["swiglu", "silu", "gelu"] = "swiglu"
    scaled_residuals: bool = True

    @property
    def changed(self) -> dict[str, object]:
        """What differs, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
