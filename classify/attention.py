"""transformers' encoders with the attention of experiment/nn/attention.py instead of torch's kernel."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from experiment.compat.transformers import attention_of, takes_other_attention
from experiment.nn.attention import attention, uses_manual_backward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tinylab"  # its name in transformers


def use_fast_attention(model: "PreTrainedModel") -> None:
    """Let a model that uses `scaled_dot_product_attention` choose its kernel at each call; leave others unchanged."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if attention_of(model) == "sdpa" and takes_other_attention(model):
        AttentionInterface.register(NAME, _forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def has_fast_attention(model: nn.Module) -> bool:
    """Whether `use_fast_attention` took effect: then attention accepts a (B, 1, 1, T) bool mask directly."""
    return attention_of(model) == NAME


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output (B, T, heads, head_dim) for query, key and value (B, heads, T, head_dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = scaling in (None, query.shape[-1] ** -0.5) and getattr(module, "is_causal", True) is False
    plain = plain and not dropout and not {"is_causal", "position_bias"} & kwargs.keys()
    if plain and uses_manual_backward(query, key, value):
        return attention(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
