"""The decoder's twin in transformers, which tests compare it with."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from lm.model.decoder import Decoder


def weights_in_transformers(decoder: Decoder) -> dict[str, tuple[str, slice]]:
    """Which rows of our matrices are which of Llama's, written out independently of lm.convert."""
    config = decoder.config
    query, key = config.hidden_size, config.kv_heads * config.head_dim
    inner = config.intermediate_size
    names = {"model.embed_tokens": ("embedding", slice(None)), "model.norm": ("norm", slice(None))}
    if not config.tie_embeddings:
        names["lm_head"] = ("head", slice(None))
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        names |= {
            f"{theirs}.input_layernorm": (f"{ours}.attention_norm", slice(None)),
            f"{theirs}.post_attention_layernorm": (f"{ours}.feed_forward_norm", slice(None)),
            f"{theirs}.self_attn.q_proj": (f"{ours}.attention.qkv", slice(0, query)),
            f"{theirs}.self_attn.k_proj": (f"{ours}.attention.qkv", slice(query, query + key)),
            f"{theirs}.self_attn.v_proj": (f"{ours}.attention.qkv", slice(query + key, query + 2 * key)),
            f"{theirs}.self_attn.o_proj": (f"{ours}.attention.out", slice(None)),
            f"{theirs}.mlp.gate_proj": (f"{ours}.feed_forward.gate_up", slice(0, inner)),
            f"{theirs}.mlp.up_proj": (f"{ours}.feed_forward.gate_up", slice(inner, 2 * inner)),
            f"{theirs}.mlp.down_proj": (f"{ours}.feed_forward.down", slice(None)),
            f"{theirs}.self_attn.q_norm": (f"{ours}.attention.query_norm", slice(None)),
            f"{theirs}.self_attn.k_norm": (f"{ours}.attention.key_norm", slice(None)),
        }
    return {f"{theirs}.weight": (f"{ours}.weight", rows) for theirs, (ours, rows) in names.items()}


def in_transformers(decoder: Decoder, **changes) -> PreTrainedModel:
    """transformers' Llama, or Qwen3, with the decoder's weights; changes are of its configuration."""
    config = decoder.config
    model_of, config_of = LlamaForCausalLM, LlamaConfig
    if config.query_key_norm:
        model_of, config_of = Qwen3ForCausalLM, Qwen3Config
    reference = model_of(
        config_of(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            **changes,
        )
    ).eval()
    ours = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            source, rows = weights_in_transformers(decoder)[name]
            parameter.copy_(ours[source][rows])
    if config.value_residual:
        _mix_values(reference, [block.attention.value_shares for block in decoder.blocks])
    return reference


def _mix_values(reference: PreTrainedModel, shares: Sequence[Tensor | None]) -> None:
    """Let each later layer mix its values with the first layer's, as Zhou et al. (2024, arXiv:2410.17897) do."""
    first = []

    def mix(layer: int, value: Tensor) -> Tensor:
        if layer == 0:
            first[:] = [value]
            return value
        own, others = shares[layer]
        return own * value + others * first[0]

    for layer, block in enumerate(reference.model.layers):
        block.self_attn.v_proj.register_forward_hook(lambda _, inputs, value, layer=layer: mix(layer, value))
