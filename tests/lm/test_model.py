"""The decoder against transformers' Llama, and its cache against no cache."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder
from lm.model.kv_cache import KeyValueCache
from tests.references import in_transformers, weights_in_transformers

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_layers": 3,
    "num_heads": 6,
    "max_sequence_length": 64,
}
VARIANTS = [
    {"num_kv_heads": 6, "tie_embeddings": True, "rope_theta": 10000.0},
    {"num_kv_heads": 2, "tie_embeddings": False, "rope_theta": 10000.0},
    {"num_kv_heads": 3, "tie_embeddings": True, "rope_theta": 500000.0},
    {"num_kv_heads": 1, "tie_embeddings": False, "rope_theta": 100.0, "rms_norm_eps": 1e-6},
    {"num_heads": 2, "hidden_size": 64, "intermediate_size": 33, "num_layers": 1},
    {"num_kv_heads": 2, "query_key_norm": True},  # Qwen3
    {"num_kv_heads": 2, "value_residual": True},
]


def make_decoder(seed: int = 0, scale: float = 5.0, **changes) -> Decoder:
    """A random decoder whose weights are large enough for errors to show in the logits."""
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(**{**SHAPE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("value_shares"):
                parameter.uniform_(-1.0, 1.0)
            else:
                parameter.mul_(scale)
    return decoder


def random_ids(batch_size: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SHAPE["vocab_size"], (batch_size, length), generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant):
    decoder = make_decoder(**variant)
    ids = random_ids(3, 64)
    with torch.no_grad():
        expected = in_transformers(decoder)(ids).logits
        torch.testing.assert_close(decoder(ids), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1  # flat logits would agree too


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_transformers(variant):
    decoder = make_decoder(scale=2.0, **variant)
    reference = in_transformers(decoder)
    ids = random_ids(3, 33)

    def backward(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """The decoder's gradients; the shares of values are its own in the reference too."""
        decoder.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}

    ours, shares = backward(decoder(ids)), backward(reference(ids).logits)
    expected = {name: (ours[name], gradient) for name, gradient in shares.items()}
    for name, parameter in reference.named_parameters():
        source, rows = weights_in_transformers(decoder)[name]
        expected[name] = ours[source][rows], parameter.grad
    assert len(shares) == (decoder.config.num_layers - 1) * decoder.config.value_residual
    for name, (gradient, reference_gradient) in expected.items():
        assert (gradient - reference_gradient).norm() < 1e-4 * reference_gradient.norm(), name


@pytest.mark.parametrize(
    ("dtype", "tolerance", "value_residual"),
    [(torch.bfloat16, 2e-2, False), (torch.float32, 1e-5, True)],
)
@pytest.mark.slow
def test_compiled_blocks_give_the_same_hidden_states_and_gradients(dtype, tolerance, value_residual):
    """For batches of several shapes and for all layers, with one piece of code; with two where the first layer is none
    that mixes values."""
    decoder = make_decoder(scale=2.0, num_kv_heads=2, value_residual=value_residual).train()

    def outcome(batch_size: int, length: int) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = decoder.hidden_states(random_ids(batch_size, length))
        decoder.zero_grad()
        hidden.sin().sum().backward()
        return [hidden, *(parameter.grad.clone() for parameter in decoder.parameters())]

    shapes = (3, 8), (5, 33)
    plain = [outcome(*shape) for shape in shapes]
    torch._dynamo.reset()
    counters["stats"].clear()
    decoder.compile_blocks()
    for expected, shape in zip(plain, shapes, strict=True):
        for left, right in zip(outcome(*shape), expected, strict=True):
            assert (left - right).norm() <= tolerance * right.norm()
    assert counters["stats"]["unique_graphs"] == 1 + value_residual


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_training_stays_on_the_fused_attention_kernel(num_kv_heads):
    decoder = make_decoder(num_kv_heads=num_kv_heads, dropout=0.1).train()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        decoder(random_ids(2, 16)).sum().backward()
    names = {event.key for event in trace.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names


def test_no_token_sees_a_later_one():
    decoder = make_decoder(num_kv_heads=2)
    ids = random_ids(1, 20)
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids)[:, :12], decoder(changed)[:, :12], rtol=0, atol=1e-6)


def test_initialization_follows_its_table():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**SHAPE, "hidden_size": 192, "tie_embeddings": False}))
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 6**0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_tied_head_is_the_embedding():
    tied, untied = make_decoder(tie_embeddings=True), make_decoder(tie_embeddings=False)
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is not untied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 97 * 48


def test_dropout_acts_in_training_only():
    decoder = make_decoder(dropout=0.5)
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(decoder(ids), decoder(ids))
        decoder.train()
        assert not torch.equal(decoder(ids), decoder(ids))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide"),
        ({"num_kv_heads": 4}, "num_kv_heads=4 does not divide"),
        ({"num_heads": 16, "num_kv_heads": 4}, "odd"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"max_sequence_length": 0}, "max_sequence_length=0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_impossible_configurations_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        DecoderConfig(**{**SHAPE, **changes})
    assert "\n" not in str(error.value)


def test_sequences_past_the_context_are_refused():
    decoder = make_decoder()
    with pytest.raises(ValueError, match=r"65 tokens.*max_sequence_length=64"):
        decoder(random_ids(1, 65))
    with pytest.raises(ValueError, match="capacity=65"):
        KeyValueCache(decoder.config, batch_size=1, capacity=65)


def test_a_cache_refuses_to_overflow_and_stays_usable():
    decoder = make_decoder()
    ids = random_ids(2, 9)
    cache = KeyValueCache(decoder.config, batch_size=2, capacity=8)
    with torch.no_grad():
        decoder(ids[:, :7], cache, torch.tensor([3, 7]))
        with pytest.raises(ValueError, match="9 tokens do not fit the cache of 8"):
            decoder(ids[:, 7:], cache)
        assert cache.lengths.tolist() == [3, 7]
        torch.testing.assert_close(decoder(ids[:, 7:8], cache)[1, 0], decoder(ids[1:, :8])[0, -1])
        with pytest.raises(ValueError, match=r"lengths=\[2, 0\]"):
            decoder(ids[:, 8:], cache, torch.tensor([2, 0]))


@pytest.mark.parametrize("variant", [{"num_kv_heads": 6}, {"num_kv_heads": 2}, {"value_residual": True}])
@pytest.mark.parametrize("pieces", [[64], [1] * 64, [10, 1, 1, 5, 1, 46], [63, 1]])
def test_cached_logits_equal_uncached(variant, pieces):
    decoder = make_decoder(**variant)
    ids = random_ids(2, 64)
    cache = KeyValueCache(decoder.config, batch_size=2, capacity=64)
    with torch.no_grad():
        logits = torch.cat([decoder(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, decoder(ids), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_rows_of_different_lengths_equal_each_alone(num_kv_heads):
    """Prompts of 3, 11 and 7 tokens, then pieces of which each row takes its own number, some none."""
    decoder = make_decoder(num_kv_heads=num_kv_heads)
    ids = random_ids(3, 40)
    steps = [[3, 11, 7], [1, 1, 1], [4, 0, 2], [1, 1, 1], [0, 6, 3], [1, 1, 1]]
    capacity = max(sum(row) for row in zip(*steps, strict=True))  # the fullest row ends at the last slot
    cache = KeyValueCache(decoder.config, batch_size=3, capacity=capacity)
    done = [0, 0, 0]
    with torch.no_grad():
        expected = decoder(ids)
        for counts in steps:
            piece = torch.full((3, max(counts)), 96)  # padding that would be noticed
            for row, count in enumerate(counts):
                piece[row, :count] = ids[row, done[row] : done[row] + count]
            logits = decoder(piece, cache, torch.tensor(counts))
            for row, count in enumerate(counts):
                torch.testing.assert_close(
                    logits[row, :count], expected[row, done[row] : done[row] + count], rtol=1e-5, atol=2e-5
                )
                done[row] += count
            assert cache.lengths.tolist() == done


def test_garbage_beyond_a_rows_length_is_never_visible():
    decoder = make_decoder(num_kv_heads=2)
    ids = random_ids(2, 12)
    results = []
    for padding in (0, 50):
        cache = KeyValueCache(decoder.config, batch_size=2, capacity=16)
        prompt = ids[:, :10].clone()
        prompt[0, 4:] = padding
        with torch.no_grad():
            decoder(prompt, cache, torch.tensor([4, 10]))
            one = decoder(ids[:, 10:11], cache)
            two = decoder(ids[:, 10:], cache, torch.tensor([2, 1]))
            results.append([one, two[:, :1]])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_keeping_rows_of_a_cache_keeps_their_stories():
    decoder = make_decoder(num_kv_heads=3)
    ids = random_ids(3, 12)
    cache = KeyValueCache(decoder.config, batch_size=3, capacity=12)
    with torch.no_grad():
        decoder(ids[:, :10], cache, torch.tensor([10, 4, 10]))
        cache.keep([2, 0])
        logits = decoder(ids[[2, 0], 10:11], cache)
        torch.testing.assert_close(logits[:, 0], decoder(ids[[2, 0], :11])[:, -1], rtol=1e-5, atol=2e-5)


def test_bfloat16_autocast_keeps_logits_close():
    decoder = make_decoder(scale=2.0, num_kv_heads=2)
    ids = random_ids(2, 16)
    with torch.no_grad():
        expected = decoder(ids)
        with torch.autocast("cpu", torch.bfloat16):
            logits = decoder(ids)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() / expected.norm() < 0.02
