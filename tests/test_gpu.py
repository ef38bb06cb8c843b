"""On a CUDA GPU everything gives what it gives on a CPU; skipped where there is none."""

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiment.pages.summary import read_metrics
from experiment.sources.batches import DeviceLoader
from lm.__main__ import main
from lm.decoding import cuda_graphs
from lm.decoding.generation import generate
from lm.decoding.sampling import LARGEST_DRAW, sample
from lm.model.config import DecoderConfig, GenerationConfig
from lm.model.decoder import Decoder
from lm.model.loss import linear_cross_entropy, summed_loss, token_losses
from lm.training.compiled_loss import CompiledLoss
from lm.training.module import LanguageModel
from lm.training.muon import Muon, orthogonalize
from tests.processes import Commands
from tests.runs import STEPS, TINY, assert_same_run, kill_and_resume, rows, write_stories

if torch.cuda.is_available():
    from lm.decoding import sampling_kernel  # needs Triton
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = ["--trainer.accelerator=gpu", "--trainer.devices=1"]
CONFIG = DecoderConfig(
    vocab_size=3000, hidden_size=64, intermediate_size=172, num_layers=3, num_heads=4, num_kv_heads=2,
    max_sequence_length=64, query_key_norm=True, value_residual=True,
)  # fmt: skip
PROMPTS = [[1, 5, 9], [1, 7], [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval()
    with torch.no_grad():  # far from uniform, so that the likeliest token stands clear of the next
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return decoder


def test_logits_and_gradients_equal_those_of_the_processor(decoder: Decoder) -> None:
    ids = torch.randint(CONFIG.vocab_size, (5, 33), generator=torch.Generator().manual_seed(1))
    found = {}
    for device in ("cpu", "cuda"):
        decoder.to(device).zero_grad()
        logits = decoder(ids.to(device))
        logits.logsumexp(-1).sum().backward()
        found[device] = logits.detach().cpu(), {n: p.grad.to("cpu", copy=True) for n, p in decoder.named_parameters()}
    decoder.cpu().zero_grad()
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], atol=2e-4, rtol=1e-4)
    for name, gradient in found["cpu"][1].items():
        error = (found["cuda"][1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("num_tokens", [70, 5000])
def test_loss_and_gradients_equal_autograd(autocast: bool, num_tokens: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 64, device="cuda", requires_grad=True)
    weight = torch.randn(5000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(5000, (num_tokens,), device="cuda")
    weights = (torch.rand(num_tokens, device="cuda") > 0.3).float()
    (F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none") * weights).sum().backward()
    expected = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        linear_cross_entropy(hidden, weight, targets, weights).backward()
        losses = token_losses(hidden, weight, targets)
    tolerance = 2e-2 if autocast else 1e-5
    for found, right in zip((hidden.grad, weight.grad), expected, strict=True):
        assert (found - right).norm() < tolerance * right.norm()
    right = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    assert (losses - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("use_graphs", [False, True])
def test_one_compiled_function_trains_as_the_plain_code(use_graphs: bool) -> None:
    """Batch to loss, its gradients clipped and stepped with, and a last batch of fewer rows."""
    torch.manual_seed(0)
    decoders = [Decoder(CONFIG).cuda()]
    decoders.append(copy.deepcopy(decoders[0]))
    functions = partial(summed_loss, decoders[0]), CompiledLoss(decoders[1], use_graphs, rows=8)
    losses: list[list[torch.Tensor]] = [[], []]
    for found, decoder, function in zip(losses, decoders, functions, strict=True):
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(1)
        for rows_ in (8, 8, 8, 8, 5, 8):
            tokens = torch.randint(CONFIG.vocab_size, (rows_, 65), generator=generator, dtype=torch.int32)
            loss_mask = torch.rand(rows_, 64, generator=generator) > 0.2
            loss, count = function(tokens.cuda(), loss_mask.cuda())
            mean = loss / count
            if not use_graphs or decoder is decoders[0]:
                optimizer.zero_grad()
            mean.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            found.append(mean.detach().clone())
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("extra", [[], ["--model.compile=true"], ["--model.optimizer.muon_learning_rate=0.02"]])
def test_training_makes_the_host_wait_at_logged_steps_only(
    extra: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(self: LanguageModel, batch: object, batch_idx: int) -> None:
        step = self.trainer.global_step + 1
        torch.cuda.set_sync_debug_mode("error" if step > 4 and step % 6 else "default")  # code is made before

    monkeypatch.setattr(LanguageModel, "on_train_batch_start", watch)
    flags = ["--trainer.max_steps=18", "--trainer.log_every_n_steps=6", "--trainer.val_check_interval=1000"]
    flags += ["--checkpoint.every_n_steps=1000", "--samples.every_n_steps=0", "--trainer.gradient_clip_val=1"]
    flags += ["--data.batch_size=1", "--run_dir=run"]
    try:
        main(["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, *GPU, *flags, *extra])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logged = [row for row in read_metrics(Path("run")) if "train/loss" in row]
    assert [row["step"] for row in logged] == [6, 12, 18]
    assert all(row["train/peak_memory_gib"] > 0 for row in logged)


def test_batches_that_go_ahead_to_the_gpu_are_those_of_the_cpu() -> None:
    batches = [{"tokens": torch.full((4, 9), i, dtype=torch.int32), "reader": i} for i in range(50)]
    loader = DeviceLoader(batches, batch_size=None, pin_memory=True)
    loader.device = torch.device("cuda")
    found = list(loader)
    assert [batch["reader"] for batch in found] == list(range(50))
    assert all(batch["tokens"].is_cuda and bool((batch["tokens"] == i).all()) for i, batch in enumerate(found))


def test_muon_in_compiled_code_moves_as_in_plain_code() -> None:
    torch.manual_seed(0)
    shapes = [(48, 80), (80, 48), (48, 80), (144, 48)]
    plain = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    compiled = copy.deepcopy(plain)
    optimizers = Muon(plain, lr=0.02), Muon(compiled, lr=0.02, compiled=True)
    for step in range(3):
        for parameters, optimizer in zip((plain, compiled), optimizers, strict=True):
            generator = torch.Generator(device="cuda").manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
            optimizer.step()
    for left, right in zip(plain, compiled, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)


def test_muon_orthogonalizes_as_on_the_processor() -> None:
    matrices = torch.randn(3, 40, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalize(matrices.cuda()).cpu(), orthogonalize(matrices), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_stories_equal_those_of_the_processor(
    decoder: Decoder, prompts: list[list[int]], temperature: float, compile: bool
) -> None:
    config = {"max_new_tokens": 50, "temperature": temperature}
    expected = [row.token_ids for row in generate(decoder.cpu(), prompts, GenerationConfig(use_cache=False, **config))]
    try:
        found = generate(decoder.cuda(), prompts, GenerationConfig(compile=compile, **config))
    finally:
        decoder.cpu()
    assert [row.token_ids for row in found] == expected


SAMPLING = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.2, "top_k": 300, "top_p": 0.7, "min_p": 0.01, "repetition_penalty": 1.2},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 150, "sliding_window": True},
]


def stories(decoder: Decoder, prompts: list[list[int]], eos_id: int | None = None, **settings) -> list[list[int]]:
    config = GenerationConfig(**{"max_new_tokens": 50, **settings})
    return [result.token_ids for result in generate(decoder, prompts, config, eos_id)]


def assert_same_stories(found: list[list[int]], expected: list[list[int]], sampled: bool) -> None:
    """Where it is sampled, rounding may turn a draw that falls on the border of two tokens, and with it one story."""
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same >= len(expected) - sampled, f"{found}, expected {expected}"


@pytest.fixture
def on_gpu(decoder: Decoder) -> Iterator[Decoder]:
    yield decoder.cuda()
    decoder.cpu()


@pytest.mark.parametrize("settings", SAMPLING)
def test_graphs_give_the_tokens_of_the_processor_with_every_filter(decoder, settings, monkeypatch) -> None:
    monkeypatch.setattr("lm.decoding.cuda_graphs.SHORTEST", 16)  # several graphs
    expected = stories(decoder.cpu(), PROMPTS, **settings)
    eos_id = expected[0][20]
    ended = stories(decoder, PROMPTS, eos_id, **settings)
    try:
        decoder.cuda()
        for _ in range(2):  # captures, then replays what the call before captured
            assert_same_stories(stories(decoder, PROMPTS, **settings), expected, settings["temperature"] > 0)
        assert_same_stories(stories(decoder, PROMPTS, eos_id, **settings), ended, settings["temperature"] > 0)
        ((_, steps),) = [kept for held, kept in cuda_graphs._kept.items() if held is decoder]
        assert steps.on_gpu and steps.graphs, "the step was not captured"
    finally:
        decoder.cpu()


def test_a_step_that_cannot_be_captured_is_called(on_gpu: Decoder, monkeypatch) -> None:
    expected = stories(on_gpu, PROMPTS, temperature=0.7)
    cuda_graphs._kept.clear()
    one_token = cuda_graphs.one_token

    def refuses(*given):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")
        return one_token(*given)

    monkeypatch.setattr(cuda_graphs, "one_token", refuses)
    assert stories(on_gpu, PROMPTS, temperature=0.7) == expected
    ((_, steps),) = cuda_graphs._kept.values()
    assert not steps.on_gpu and not steps.graphs
    cuda_graphs._kept.clear()


@pytest.mark.parametrize("settings", SAMPLING[:4])
def test_no_token_makes_the_host_wait(on_gpu: Decoder, settings) -> None:
    stories(on_gpu, PROMPTS, **settings)  # compiles and captures
    waits = []
    for new_tokens in (10, 50):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                stories(on_gpu, PROMPTS, **{**settings, "max_new_tokens": new_tokens})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert waits[0] == waits[1], "more tokens, more waiting"


@pytest.mark.parametrize("vocab_size", [61, 3000, 32768])
@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.5, "min_p": 0.02}])
def test_the_sampling_kernel_draws_the_tokens_of_the_processor(vocab_size: int, settings: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, draws = 3 * torch.randn(64, vocab_size, generator=generator), torch.rand(64, generator=generator)
    draws[:2] = torch.tensor([0.0, LARGEST_DRAW])
    config = GenerationConfig(temperature=0.9, **settings)
    found = sampling_kernel.sample(logits.cuda(), draws.cuda(), config).cpu()
    same = found == sample(logits, draws, config)
    assert same.sum() >= 63, "rounding may turn one draw at a border"


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--model.optimizer.muon_learning_rate=0.02", "--model.decoder.value_residual=true"],
        ["--model.compile=true"],
        ["--data.packing=true", "--trainer.accumulate_grad_batches=2", "--trainer.precision=32-true"],
    ],
)
def test_killed_run_resumes_to_the_same_losses_and_weights(extra: list[str], commands: Commands, in_tmp: Path) -> None:
    arguments = [f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, *GPU, *extra]
    commands.run("fit", *arguments, "--run_dir=whole", folder=in_tmp)
    kill_and_resume(commands, [*arguments, "--run_dir=run"], STEPS, seed=0)
    assert_same_run(Path("run"), Path("whole"))


def test_training_has_the_losses_of_the_processor(commands: Commands, in_tmp: Path) -> None:
    arguments = [f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--model.decoder.dropout=0"]
    arguments += ["--trainer.precision=32-true", "--model.optimizer.muon_learning_rate=0.02"]
    commands.run("fit", *arguments, "--run_dir=cpu", folder=in_tmp)
    commands.run("fit", *arguments, *GPU, "--run_dir=gpu", folder=in_tmp)
    for left, right in zip(rows(Path("cpu")), rows(Path("gpu")), strict=True):
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=2e-3)
        if left["val/loss"]:
            assert float(left["val/loss"]) == pytest.approx(float(right["val/loss"]), abs=2e-3)
