"""Variants of the decoder against closed forms and torch's own modules, each with one part changed and no other."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiment.errors import InputError
from lm.decoding.generation import generate
from lm.formats.hugging_face import to_hugging_face
from lm.formats.llama2c import to_llama2c
from lm.model.config import DecoderConfig, GenerationConfig
from lm.model.decoder import Decoder
from lm.model.kv_cache import KeyValueCache
from lm.model.variants import Variant, VariantDecoder, make_decoder
from lm.training.optim import OptimizerConfig, make_optimizer

CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_layers=3, num_heads=4, max_sequence_length=32,
    query_key_norm=True, value_residual=True,
)  # fmt: skip
CHANGES = [
    {"positions": "learned"}, {"positions": "none"}, {"norm": "layer"}, {"norm": "none"}, {"norm_place": "post"},
    {"norm_place": "post", "norm": "layer"}, {"feed_forward": "silu"}, {"feed_forward": "gelu"},
    {"scaled_residuals": False},
]  # fmt: skip
IDS = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(0))


def make(config: DecoderConfig = CONFIG, **changes: object) -> Decoder:
    torch.manual_seed(0)
    return make_decoder(config, Variant(**changes)).eval()


def size(decoder: Decoder) -> int:
    return sum(parameter.numel() for parameter in decoder.parameters())


def test_variant_without_changes_is_the_decoder_itself() -> None:
    assert type(make()) is Decoder


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_a_variant_shares_with_the_decoder_begins_with_the_same_values(changes: dict) -> None:
    plain, variant = make().state_dict(), make(**changes).state_dict()
    # Ends of branches begin larger by sqrt(2 x 3 layers) where that is what is changed.
    factor = 1.0 if changes.get("scaled_residuals", True) else 6**0.5
    for name in plain.keys() & variant.keys():
        larger = factor if name.endswith(("out.weight", "down.weight")) else 1.0
        if plain[name].shape == variant[name].shape:
            torch.testing.assert_close(variant[name], plain[name] * larger)


def test_parameters_are_as_many_where_that_is_claimed() -> None:
    norms, positions = (2 * 3 + 1) * 48, 32 * 48
    expected = {"learned": positions, "none": 0, "layer": 0, "silu": 0, "gelu": 0, "post": -48}
    for name, value in [("positions", "learned"), ("positions", "none"), ("norm", "layer"), ("feed_forward", "silu"),
                        ("feed_forward", "gelu"), ("norm_place", "post")]:  # fmt: skip
        assert size(make(**{name: value})) - size(make()) == expected[value], value
    assert size(make(norm="none")) == size(make()) - norms


def test_without_positions_the_order_of_earlier_tokens_does_not_matter() -> None:
    turned = torch.cat((IDS[:, :-1].flip(1), IDS[:, -1:]), dim=1)
    one_layer = DecoderConfig(**{**vars(CONFIG), "num_layers": 1})  # of several, the mask alone tells order
    for changes, equal in (({"positions": "none"}, True), ({}, False), ({"positions": "learned"}, False)):
        decoder = make(one_layer, **changes)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.mul_(5)
            last, other = decoder(IDS)[:, -1], decoder(turned)[:, -1]
        assert torch.allclose(last, other, atol=1e-4) is equal, changes


def test_learned_positions_are_added_to_the_embedding() -> None:
    learned, none = make(positions="learned"), make(positions="none")
    with torch.no_grad():
        expected = learned.embedding.weight[IDS] + learned.positions.weight[:20]
        none.embedding = torch.nn.Embedding.from_pretrained(expected.flatten(0, 1))
        ids = torch.arange(60).view(3, 20)
        torch.testing.assert_close(none.hidden_states(ids), learned.hidden_states(IDS))


def reference(decoder: Decoder, norm: str, place: str, feed_forward: str) -> torch.Tensor:
    """The logits by a loop over the blocks in plain torch, with their attention as it is."""

    def normed(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        if norm == "none" or isinstance(module, torch.nn.Identity):
            return x
        if norm == "layer":
            return F.layer_norm(x, (48,), module.weight, eps=CONFIG.rms_norm_eps)
        return F.rms_norm(x, (48,), module.weight, eps=CONFIG.rms_norm_eps)

    def inside(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        up = x @ block.feed_forward.gate_up.weight.T
        if feed_forward == "swiglu":
            gate, up = up.chunk(2, dim=-1)
            return (gate * torch.sigmoid(gate) * up) @ block.feed_forward.down.weight.T
        halves = {"silu": up * torch.sigmoid(up), "gelu": up * 0.5 * (1 + torch.erf(up / 2**0.5))}
        return halves[feed_forward] @ block.feed_forward.down.weight.T

    x, first = decoder.embedding.weight[IDS], None
    cos, sin = decoder.cos[:20, None], decoder.sin[:20, None]
    for layer, block in enumerate(decoder.blocks):
        if place == "pre":
            mixed, value = block.attention(normed(block.attention_norm, x), cos, sin, first)
            x = x + mixed
            x = x + inside(block, normed(block.feed_forward_norm, x))
        else:
            mixed, value = block.attention(x, cos, sin, first)
            x = normed(block.attention_norm, x + mixed)
            x = normed(block.feed_forward_norm, x + inside(block, x))
        first = value if layer == 0 else first
    return normed(decoder.norm, x) @ decoder.head_weight.T


@pytest.mark.parametrize(
    "changes", [c for c in CHANGES if "positions" not in c and "scaled_residuals" not in c] + [{}], ids=str
)
def test_logits_equal_a_plain_loop_over_the_blocks(changes: dict) -> None:
    decoder = make(**changes)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif "norm" not in changes or changes["norm"] != "none":
                parameter.mul_(5)
        expected = reference(
            decoder, changes.get("norm", "rms"), changes.get("norm_place", "pre"), changes.get("feed_forward", "swiglu")
        )
        torch.testing.assert_close(decoder(IDS), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.001


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_variants_decode_with_a_cache_as_without_and_train_by_both_optimizers(changes: dict) -> None:
    decoder = make(**changes)
    with torch.no_grad():
        cache = KeyValueCache(CONFIG, 3, 20)
        parts = [decoder(IDS[:, :12], cache), *(decoder(IDS[:, i : i + 1], cache) for i in range(12, 20))]
        torch.testing.assert_close(torch.cat(parts, dim=1), decoder(IDS), rtol=1e-4, atol=1e-5)
    plain, compiled = (
        GenerationConfig(temperature=0.0, max_new_tokens=5, compile=compile) for compile in (False, True)
    )
    (story,), (other,) = (generate(decoder, [[1, 2, 3]], config, eos_id=2, decode=str) for config in (plain, compiled))
    assert story.token_ids == other.token_ids
    for config in (OptimizerConfig(), OptimizerConfig(muon_learning_rate=0.02)):
        optimizer = make_optimizer(decoder, config)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in decoder.parameters()}
        before = [parameter.clone() for parameter in decoder.parameters()]
        optimizer.zero_grad()
        F.cross_entropy(decoder(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        assert all(not torch.equal(*pair) for pair in zip(before, decoder.parameters(), strict=True))


@pytest.mark.parametrize("export", [to_hugging_face, to_llama2c])
def test_no_variant_is_exported(export, tmp_path: Path) -> None:
    plain = DecoderConfig(**{**vars(CONFIG), "query_key_norm": False, "value_residual": False})
    for changes in CHANGES:
        decoder = make(plain, **changes)
        assert isinstance(decoder, VariantDecoder)
        with pytest.raises(InputError, match=f"model.variant.{next(iter(changes))} .*no other program supports it"):
            export(decoder, Tokens(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Tokens:
    """As much of a tokenizer as an export looks at before the weights."""

    vocab_size = 97
