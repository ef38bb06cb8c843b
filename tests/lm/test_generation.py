"""Decoding against transformers' generate and against itself under other settings."""

import copy
import itertools
import math

import pytest
import torch
import torch._inductor.config
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lm.decoding.cuda_graphs import LATE, GraphSteps
from lm.decoding.generation import generate
from lm.decoding.quantization import quantize
from lm.decoding.sampling import argmax, filter_logits, penalize_repetition
from lm.model.config import DecoderConfig, GenerationConfig
from lm.model.decoder import Decoder
from tests.references import in_transformers

VOCAB_SIZE, CONTEXT = 61, 48
PROMPTS = [[1, 5, 9], [1], [1, 20, 30, 40, 50, 60, 2, 3], [1, 5, 9, 7], [1, 8, 8]]


def make_decoder(scale: float = 6.0, **changes) -> Decoder:
    torch.manual_seed(3)
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_sequence_length": CONTEXT,
        "tie_embeddings": False,
    }
    decoder = Decoder(DecoderConfig(**{**shape, **changes}))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(scale if parameter.ndim == 2 else 1.0)
    return decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


def tokens(decoder: Decoder, prompts: list[list[int]], eos_id: int | None = None, **settings) -> list[list[int]]:
    config = GenerationConfig(**{"max_new_tokens": 30, "temperature": 0.0, **settings})
    return [result.token_ids for result in generate(decoder, prompts, config, eos_id)]


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_equal_transformers_generate(decoder, use_cache, repetition_penalty):
    reference = in_transformers(decoder, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    ours = tokens(decoder, PROMPTS, use_cache=use_cache, repetition_penalty=repetition_penalty)
    for prompt, story in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=repetition_penalty,
        )
        assert story == expected[0, len(prompt) :].tolist()
    assert len({tuple(story) for story in ours}) == len(PROMPTS)  # one story for all would be no evidence


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    {"temperature": 1.0, "max_new_tokens": 150, "sliding_window": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_cached_decoding_equals_uncached(decoder, settings):
    assert tokens(decoder, PROMPTS, **settings) == tokens(decoder, PROMPTS, **settings, use_cache=False)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_prompt_gives_the_same_story_alone_and_in_a_batch(decoder, settings, use_cache):
    settings = {**settings, "use_cache": use_cache}
    eos_id = tokens(decoder, PROMPTS[:1], **settings)[0][11]  # ends some rows early, which must not touch the others
    together = tokens(decoder, PROMPTS, eos_id, **settings)
    assert len({len(story) for story in together}) > 1
    assert together == [tokens(decoder, [prompt], eos_id, **settings)[0] for prompt in PROMPTS]
    assert together[::-1] == tokens(decoder, PROMPTS[::-1], eos_id, **settings)


def test_rows_that_ended_are_no_longer_computed(decoder, monkeypatch):
    greedy = tokens(decoder, PROMPTS)
    eos_id = greedy[0][4]
    lengths = [story.index(eos_id) + 1 if eos_id in story else 30 for story in greedy]
    rows = []
    hidden_states = Decoder.hidden_states

    def spy(self, input_ids, *arguments):
        rows.append(len(input_ids))
        return hidden_states(self, input_ids, *arguments)

    monkeypatch.setattr(Decoder, "hidden_states", spy)
    tokens(decoder, PROMPTS, eos_id)
    assert rows == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert rows[-1] < rows[0]


def test_the_seed_alone_decides_what_is_sampled(decoder):
    settings = {"temperature": 1.0}
    first = tokens(decoder, PROMPTS, **settings, seed=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert tokens(decoder, PROMPTS, **settings, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state), "decoding used the global generator"
    second = tokens(decoder, PROMPTS, **settings, seed=2)
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_a_longer_story_begins_with_the_shorter_one(decoder):
    short = tokens(decoder, PROMPTS, temperature=1.0, max_new_tokens=10)
    long = tokens(decoder, PROMPTS, temperature=1.0, max_new_tokens=25)
    assert [story[:10] for story in long] == short


def test_a_prompt_repeated_in_a_batch_becomes_several_stories(decoder):
    repeated = tokens(decoder, [PROMPTS[0]] * 3, temperature=1.0)
    assert repeated[0] == tokens(decoder, PROMPTS[:1], temperature=1.0)[0]
    assert len({tuple(story) for story in repeated}) == 3


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}],
)
def test_samples_follow_the_distribution(settings):
    """Pearson's chi-square of 4,000 draws, which must also reject a temperature that is 20 % off."""
    decoder, prompt, draws = make_decoder(vocab_size=12, scale=12.0), [1, 2, 3], 4000
    with torch.no_grad():
        logits = decoder(torch.tensor([prompt]))[0, -1]
    sampled = tokens(decoder, [prompt] * draws, **settings, max_new_tokens=1)
    counts = torch.bincount(torch.tensor(sampled).flatten(), minlength=12)

    def chi_square(temperature: float) -> tuple[float, int]:
        filters = {name: value for name, value in settings.items() if name != "temperature"}
        expected = draws * filter_logits((logits / temperature)[None], **filters).softmax(-1)[0]
        assert not counts[expected == 0].any()
        kept = expected > 0
        return ((counts - expected)[kept] ** 2 / expected[kept]).sum().item(), int(kept.sum()) - 1

    statistic, degrees = chi_square(settings["temperature"])
    border = degrees + 4 * math.sqrt(2 * degrees)
    assert statistic < border
    assert chi_square(1.2 * settings["temperature"])[0] > border


def kept(logits: list[float], **filters) -> list[int]:
    return filter_logits(torch.tensor([logits]), **filters)[0].isfinite().nonzero().flatten().tolist()


def test_filters_keep_exactly_the_tokens_they_should():
    probs = [0.05, 0.4, 0.1, 0.25, 0.2]
    logits = [math.log(p) for p in probs]
    assert kept(logits, top_k=1) == [1]
    assert kept(logits, top_k=3) == [1, 3, 4]
    assert kept(logits, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(logits, top_p=0.01) == [1]
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.41) == [1, 3]
    assert kept(logits, top_p=0.84) == [1, 3, 4]
    assert kept(logits, top_p=0.86) == [1, 2, 3, 4]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3, 4]
    assert kept(logits, min_p=1.0) == [1]
    assert kept(logits, min_p=0.26) == [1, 3, 4]
    assert kept(logits, min_p=0.0) == [0, 1, 2, 3, 4]
    # After top_k=3 the probabilities are 0.47, 0.29, 0.24: 0.7 is reached with two.
    assert kept(logits, top_k=3, top_p=0.7) == [1, 3]
    assert kept([1.0, 1.0, 1.0, 0.0], top_k=2) in ([0, 1], [0, 2], [1, 2])


def test_filters_equal_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 100, generator=generator)
    values = itertools.product([None, 1, 20], [None, 0.3, 0.9], [None, 0.05, 0.5])
    for top_k, top_p, min_p in values:
        expected = logits
        for value, warper in ((top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper), (min_p, MinPLogitsWarper)):
            expected = expected if value is None else warper(value)(None, expected)
        assert torch.equal(filter_logits(logits, top_k, top_p, min_p), expected), (top_k, top_p, min_p)


def test_filters_leave_their_input_alone():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    filter_logits(logits, 2, 0.5, 0.5)
    penalize_repetition(logits, logits > 0, 2.0)
    assert torch.equal(logits, before)


def test_a_token_that_is_held_is_penalized():
    logits, held = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert penalize_repetition(logits, held, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_temperature_zero_is_greedy_and_tiny_ones_come_to_the_same(decoder):
    greedy = tokens(decoder, PROMPTS)
    assert tokens(decoder, PROMPTS, temperature=0.0, top_p=0.5, seed=4) == greedy
    assert tokens(decoder, PROMPTS, temperature=1e-40) == greedy
    assert tokens(decoder, PROMPTS, temperature=1.0, top_k=1) == greedy


def test_eos_ends_a_story_and_is_part_of_it(decoder):
    story = tokens(decoder, PROMPTS[:1])[0]
    eos_id = story[7]
    result = generate(decoder, PROMPTS[:1], GenerationConfig(temperature=0, max_new_tokens=30), eos_id)[0]
    assert result.token_ids == story[: story.index(eos_id) + 1]
    assert result.finish_reason == "eos"


def test_a_stop_string_ends_a_story_even_across_tokens(decoder):
    def decode(ids):
        return "".join(f"{i:02d}" for i in ids)

    story = tokens(decoder, PROMPTS[:1])[0]
    text = decode(story)
    stop = text[11:15]  # half of one token, one whole, half of another
    config = GenerationConfig(temperature=0, max_new_tokens=30, stop=["never", stop])
    result = generate(decoder, PROMPTS[:1], config, decode=decode)[0]
    assert result.finish_reason == "stop"
    assert result.token_ids == story[: math.ceil((text.index(stop) + len(stop)) / 2)]
    with pytest.raises(ValueError, match="decode"):
        generate(decoder, PROMPTS[:1], config)


def test_a_stop_string_in_the_prompt_does_not_count(decoder):
    config = GenerationConfig(temperature=0, max_new_tokens=5, stop=["<1>"])
    story = tokens(decoder, PROMPTS[:1], max_new_tokens=5)[0]
    assert 1 not in story
    result = generate(decoder, PROMPTS[:1], config, decode=lambda ids: "".join(f"<{i}>" for i in ids))[0]
    assert result.token_ids == story


@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_stream_in_the_order_in_which_they_come(decoder, use_cache):
    heard = []
    config = GenerationConfig(max_new_tokens=4, temperature=0, use_cache=use_cache)
    results = generate(decoder, PROMPTS, config, on_token=lambda row, token: heard.append((row, token)))
    expected = [(row, results[row].token_ids[step]) for step in range(4) for row in range(len(PROMPTS))]
    assert heard == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_stops_at_the_end_of_the_context(decoder, use_cache):
    config = GenerationConfig(max_new_tokens=500, temperature=0, use_cache=use_cache)
    full = [1, *range(2, CONTEXT + 1)]
    results = generate(decoder, [*PROMPTS, full], config)
    # The last new token needs no place of its own: everything before it fills the context.
    lengths = [CONTEXT - len(prompt) + 1 for prompt in [*PROMPTS, full]]
    assert [len(result.token_ids) for result in results] == lengths
    assert {result.finish_reason for result in results} == {"length"}


def test_a_sliding_window_restarts_from_its_newest_half(decoder):
    """The story is what greedy decoding by hand gives with the window that the module's docstring describes."""
    window, story = list(PROMPTS[2]), []
    with torch.no_grad():
        while len(story) < 100:
            story.append(decoder(torch.tensor([window]))[0, -1].argmax().item())
            window.append(story[-1])
            if len(window) > CONTEXT:
                window = window[-CONTEXT // 2 :]
    for use_cache in (True, False):
        settings = {"max_new_tokens": 100, "sliding_window": True, "use_cache": use_cache}
        assert tokens(decoder, PROMPTS, **settings)[2] == story


@pytest.mark.parametrize("training", [True, False])
def test_the_decoder_gets_its_mode_back_and_never_drops_out(training):
    decoder = make_decoder(dropout=0.5).train(training)
    assert tokens(decoder, PROMPTS) == tokens(make_decoder(), PROMPTS)
    assert decoder.training is training
    assert decoder.blocks[0].dropout.training is training

    def fail(row, token):
        raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        generate(decoder, PROMPTS, GenerationConfig(), on_token=fail)
    assert decoder.training is training


def test_decoding_in_bfloat16_works_with_and_without_cache():
    decoder = make_decoder()
    exact = tokens(decoder, PROMPTS, max_new_tokens=5)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = tokens(decoder, PROMPTS, max_new_tokens=5)
    plain = tokens(decoder.bfloat16(), PROMPTS, max_new_tokens=5)
    for rounded in (autocast, plain):
        same = sum(one[0] == other[0] for one, other in zip(rounded, exact, strict=True))
        assert same >= len(PROMPTS) - 1  # rounding may turn one first token, not more


@pytest.mark.parametrize("vocab_size", [64, 100, 32768])
def test_the_likeliest_token_is_the_first_of_the_largest_logits(vocab_size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-50, 50, (7, vocab_size), generator=generator).float()  # many equals
    assert torch.equal(argmax(logits), logits.argmax(-1))
    for row, broken in enumerate((math.nan, math.inf, -math.inf)):
        logits[row, 5 if row < 2 else slice(None)] = broken
    assert (argmax(logits) == -1).tolist() == [True] * 3 + [False] * 4


@pytest.mark.slow
def test_the_compiled_step_gives_the_same_tokens(monkeypatch):
    """One layer, as compiling takes long; the cache grows, rows leave it, and it is filled anew past the context."""
    monkeypatch.setattr("lm.decoding.steps.GROWTH", 5)
    decoder = make_decoder(num_layers=1, num_kv_heads=2)
    settings = {"temperature": 1.0, "max_new_tokens": 100, "sliding_window": True, "eos_id": 7}
    lengths = set()
    for prompts in PROMPTS[:1], PROMPTS[1:4]:  # several rows go through matrices that oneDNN has packed
        stories = tokens(decoder, prompts, **settings)
        lengths |= set(map(len, stories))
        assert tokens(decoder, prompts, **settings, compile=True) == stories
    assert len(lengths) == 4 and max(lengths) > CONTEXT


@pytest.mark.slow
def test_compiled_code_is_made_once_for_a_shape_and_reads_the_weights_of_each_decoder(monkeypatch):
    first, second = (make_decoder(scale, num_layers=1) for scale in (6.0, 5.0))  # the shape of the test before
    with torch.no_grad():
        second.norm.weight.normal_()
    expected = tokens(first, PROMPTS[:1]), tokens(second, PROMPTS[:1])
    assert expected[0] != expected[1]
    assert tokens(first, PROMPTS[:1], compile=True) == expected[0]
    monkeypatch.delattr("lm.decoding.compilation._build")
    assert tokens(second, PROMPTS[:1], compile=True) == expected[1]
    assert tokens(first, PROMPTS[:1], compile=True) == expected[0]


@pytest.mark.parametrize(
    ("weight_dtype", "changes"),
    [("int8", {}), ("bfloat16", {"num_layers": 2, "value_residual": True})],
)
@pytest.mark.slow
def test_the_compiled_step_reads_weights_of_fewer_bits(weight_dtype, changes):
    decoder = make_decoder(**{"num_layers": 1, "vocab_size": 64, **changes})
    rounded = copy.deepcopy(decoder)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and name != "embedding.weight":
                quantized, scale = quantize(parameter)
                exact = parameter.bfloat16().float() if weight_dtype == "bfloat16" else quantized * scale[:, None]
                parameter.copy_(exact)
    assert tokens(decoder, PROMPTS[:1], weight_dtype=weight_dtype, compile=True) == tokens(rounded, PROMPTS[:1])


@pytest.mark.slow
def test_a_missing_compiler_is_one_clear_line():
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}),
        pytest.raises(ValueError, match=r"compile=True.*install g\+\+") as error,
    ):
        tokens(make_decoder(num_layers=1, hidden_size=24), PROMPTS[:1], max_new_tokens=3, compile=True)
    assert "\n" not in str(error.value)


@pytest.fixture
def ahead(monkeypatch):
    """Decoding as on a GPU: static buffers, tokens read late, rows that ended are carried along."""
    monkeypatch.setattr("lm.decoding.cuda_graphs.DEVICES", {"cpu"})
    monkeypatch.setattr("lm.decoding.cuda_graphs.SHORTEST", 8)


@pytest.mark.parametrize("settings", SETTINGS)
def test_decoding_ahead_of_the_host_gives_the_same_tokens(decoder, settings, request):
    """Rows end by eos, full context and number of tokens; attention reads 8, 16, 32 and 48 slots."""
    eos_id = tokens(decoder, PROMPTS[:1], **settings)[0][11]
    config = GenerationConfig(**{"max_new_tokens": 60, **settings})
    cases = [(PROMPTS, eos_id), (PROMPTS[2:3], None), (PROMPTS, None)]
    expected = [generate(decoder, prompts, config, eos) for prompts, eos in cases]
    assert len({result.finish_reason for results in expected for result in results}) == 2
    request.getfixturevalue("ahead")
    for (prompts, eos), results in zip(cases, expected, strict=True):
        for _ in range(2):  # in new buffers, and in those of the call before
            assert generate(decoder, prompts, config, eos) == results


def test_tokens_read_late_stream_in_order_and_end_with_the_story(decoder, ahead, monkeypatch):
    settings = {"temperature": 0, "max_new_tokens": 40, "stop": ["<7>"]}
    steps = []
    advance = GraphSteps._advance
    monkeypatch.setattr(GraphSteps, "_advance", lambda self, *given: steps.append(self) or advance(self, *given))
    eos_id = tokens(decoder, PROMPTS[:1])[0][5]
    steps.clear()
    heard = []
    results = generate(
        decoder, PROMPTS[:1], GenerationConfig(**settings), eos_id, lambda ids: "".join(f"<{i}>" for i in ids),
        on_token=lambda row, token: heard.append(token),
    )  # fmt: skip
    assert heard == results[0].token_ids and results[0].finish_reason == "eos"
    assert len(heard) < len(steps) < len(heard) + 2 * LATE, "surplus steps are few"


def test_decoding_ahead_sees_weights_that_changed_in_place_or_moved(ahead):
    decoder, other = make_decoder(), make_decoder(5.0)
    expected = tokens(other, PROMPTS)
    assert tokens(decoder, PROMPTS) != expected
    decoder.load_state_dict(other.state_dict())
    assert tokens(decoder, PROMPTS) == expected
    decoder.load_state_dict(make_decoder().state_dict(), assign=True)
    assert tokens(decoder, PROMPTS) == tokens(make_decoder(), PROMPTS)


def test_broken_weights_are_reported_ahead_of_the_host_too(ahead):
    broken = make_decoder()
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        generate(broken, PROMPTS, GenerationConfig())


def test_two_threads_may_decode_ahead_with_one_decoder(decoder, ahead):
    """The second to come has buffers of its own."""
    inner = []

    def interrupt(row, token):
        if not inner:
            inner.extend(tokens(decoder, PROMPTS[:1]))

    config = GenerationConfig(temperature=0, max_new_tokens=30)
    outer = generate(decoder, PROMPTS[:1], config, on_token=interrupt)
    assert outer[0].token_ids == inner[0]


def test_no_prompts_give_no_stories(decoder):
    assert generate(decoder, [], GenerationConfig()) == []


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([], "prompt 1 is empty"),
        ([1] * (CONTEXT + 1), f"prompt 1 has {CONTEXT + 1} tokens, but the model's context is {CONTEXT}"),
        ([VOCAB_SIZE], f"token id {VOCAB_SIZE}"),
        ([-1], "token id -1"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(decoder, prompt, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        generate(decoder, [[1], prompt], GenerationConfig())
    assert "\n" not in str(error.value)


def test_broken_weights_are_reported(decoder):
    broken = make_decoder()
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        generate(broken, [[1]], GenerationConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"stop": ["end", ""]},
        {"weight_dtype": "int4"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}=.*expected") as error:
        GenerationConfig(**settings)
    assert "\n" not in str(error.value)
