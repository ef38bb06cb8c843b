"""Private interfaces of transformers."""

from typing import Any


def attention_of(model: Any) -> str:
    """The attention that a model uses, such as ``sdpa``; there is a public setter, but no getter."""
    return model.config._attn_implementation


def takes_other_attention(model: Any) -> bool:
    """Whether the model's code lets its attention be replaced."""
    return model._can_set_attn_implementation()
