"""The private interfaces of libraries that we use are still there, and still do what we use them for."""

from pathlib import Path

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from experiment.compat import jsonargparse as compat_jsonargparse
from experiment.compat import lightning as compat_lightning
from experiment.compat import torch as compat_torch
from experiment.compat import transformers as compat_transformers

# Attributes of Lightning that are set: one that a release has renamed would be set to no effect.
SET = [
    "fit_loop.epoch_loop._batches_that_stepped", "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop._broadcast_sigterm_tensor", "_logger_connector._first_loop_iter",
    "_signal_connector._sigterm_notifier_fn",
]  # fmt: skip


class Accumulating(LightningModule):
    """One weight, and what is said of each micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.said: list[bool] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.said.append(compat_lightning.is_accumulating(self.trainer))
        return self.weight * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("name", SET)
def test_lightning_has_what_is_set(name: str) -> None:
    place = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for part in name.split("."):
        assert hasattr(place, part), part
        place = getattr(place, part)


def test_strategies_have_what_is_set() -> None:
    assert isinstance(DDPStrategy()._ddp_kwargs, dict)
    assert hasattr(ModelParallelStrategy(), "_data_parallel_size")


def test_lightning_knows_whether_a_step_goes_on() -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        accumulate_grad_batches=2, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module := Accumulating(), torch.utils.data.DataLoader(torch.ones(5)))
    assert module.said == [True, False, True, False, False]


def test_operations_on_lists_are_those_on_each_tensor() -> None:
    tensors, others = ([torch.randn(3), torch.randn(2, 2)] for _ in range(2))
    product = [tensor * 3 for tensor in tensors]
    between = [tensor.lerp(other, 0.3) for tensor, other in zip(tensors, others, strict=True)]
    torch.testing.assert_close(list(compat_torch.foreach("lerp", tensors, others, 0.3)), between)
    compat_torch.foreach("mul_", tensors, 3)
    torch.testing.assert_close(tensors, product)


def test_gradient_of_a_softmax_is_autograds() -> None:
    scores = torch.randn(3, 5, requires_grad=True)
    probs, grad = scores.softmax(-1), torch.randn(3, 5)
    probs.backward(grad)
    torch.testing.assert_close(compat_torch.softmax_backward(grad, probs.detach()), scores.grad)


def test_packed_product_is_the_product() -> None:
    rows, weight = torch.randn(4, 64), torch.randn(48, 64)
    torch.testing.assert_close(
        compat_torch.packed_product(rows, compat_torch.pack_matrix(weight)), F.linear(rows, weight)
    )


def test_product_in_eight_bits_is_that_of_the_scaled_matrix() -> None:
    rows = torch.randint(-4, 5, (4, 64)).bfloat16()
    weight, scale = torch.randint(-127, 128, (48, 64), dtype=torch.int8), torch.full((48,), 0.5, dtype=torch.bfloat16)
    product = compat_torch.int8_product(rows, weight, scale).float()
    torch.testing.assert_close(product, F.linear(rows.float(), weight.float() * 0.5), rtol=1e-2, atol=1)


def test_the_compiler_has_what_is_called() -> None:
    tensor = torch.zeros(3, 4)
    compat_torch.mark_static(tensor, 1)
    compat_torch.mark_static(tensor, [0, 1])
    compat_torch.mark_dynamic(torch.zeros(3, 4), 0)
    compat_torch.maybe_mark_dynamic(torch.zeros(3, 4), 0)
    assert all(issubclass(error, Exception) for error in compat_torch.compiler_errors())
    assert callable(torch._inductor.aoti_compile_and_package) and callable(torch._inductor.aoti_load_package)


def test_parsers_tell_their_options_and_show_a_group_last() -> None:
    parser, command = jsonargparse.ArgumentParser(), jsonargparse.ArgumentParser()
    first = command.add_argument_group("first")
    first.add_argument("--early", type=int)
    command.add_argument_group("second").add_argument("--late", type=int)
    parser.add_subcommands().add_subcommand("run", command)
    assert {"--help", "--early", "--late"} <= set(compat_jsonargparse.option_strings(parser))
    compat_jsonargparse.move_group_last(command, first)
    assert command.format_help().rindex("--late") < command.format_help().rindex("--early")


def test_an_encoder_tells_its_attention() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.BertModel(config)
    assert compat_transformers.attention_of(model) == "sdpa" and compat_transformers.takes_other_attention(model)


def test_a_file_that_claims_more_than_it_holds_is_refused_by_what_gguf_calls() -> None:
    gguf = pytest.importorskip("gguf")
    assert callable(gguf.GGUFReader._get)


def test_wandb_tells_whether_a_key_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from experiment.compat.wandb import is_logged_in

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine one.example.org\n  login user\n  password {'0123456789' * 4}\n")
    wandb.teardown()
    assert is_logged_in("https://one.example.org") and not is_logged_in("https://two.example.org")
    wandb.teardown()
