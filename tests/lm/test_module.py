"""Losses and metrics of the LightningModule, each against a direct computation."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from lm.data.module import TextDataModule
from lm.model.config import DecoderConfig
from lm.training.module import LanguageModel, TokenSums
from lm.training.optim import OptimizerConfig, learning_rate_factor, parameter_groups
from tests.windows import unpacked

TEXTS = [
    "Tom ran.",
    "Once upon a time, a cat sat on a mat and it was very happy there. The end of it.",
    "Hi, é 🎉!",
] + [f"Anna saw {count} birds in a tree, and {count} fish in the sea." for count in range(40)]


def stories(folder: Path, **options) -> TextDataModule:
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return TextDataModule(path=str(folder), tokenizer="train", vocab_size=370, sequence_length=16, **options)


def language_model(data: TextDataModule, **optimizer) -> LanguageModel:
    torch.manual_seed(0)
    shape = DecoderConfig(data.num_tokens, 16, 24, 2, 2, max_sequence_length=256)
    return LanguageModel(shape, OptimizerConfig(**optimizer))


def trainer(**options) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip


def direct_figures(model: LanguageModel, data: TextDataModule, limit: int | None = None) -> dict[str, float]:
    """Loss and bits per byte by a plain loop over single stories, no batches, no padding."""
    tokenizer, losses, text_losses, num_bytes = data.tokenizer, [], [], 0
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        sizes = tokenizer.text_bytes(ids[1:-1]).tolist()
        if limit is not None:
            ids, sizes = ids[: limit + 1], sizes[:limit]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).double()
        nats = F.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="none").tolist()
        losses += nats
        text_losses += nats[: len(sizes)]  # without eos
        num_bytes += sum(sizes)
    return {
        "val/loss": sum(losses) / len(losses),
        "val/bits_per_byte": sum(text_losses) / math.log(2) / num_bytes,
    }


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_report_perplexity_equals_a_direct_sum_for_every_batch_size(
    tmp_path: Path, batch_size: int, packing: bool
) -> None:
    data = stories(tmp_path, eval_batch_size=batch_size, packing=packing, evaluation="first_window")
    model = language_model(data)
    figures = trainer().validate(model, data, verbose=False)[0]
    expected = direct_figures(model, data, limit=16)
    assert figures["val/loss"] == pytest.approx(expected["val/loss"], abs=1e-6)
    assert figures["val/bits_per_byte"] == pytest.approx(expected["val/bits_per_byte"], abs=1e-6)
    assert figures["val/perplexity"] == pytest.approx(math.exp(expected["val/loss"]), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_full_perplexity_equals_a_direct_sum_where_no_story_needs_a_window(tmp_path: Path, batch_size: int) -> None:
    data = stories(tmp_path, eval_batch_size=batch_size)
    data.sequence_length = 128
    model = language_model(data)
    figures = trainer().validate(model, data, verbose=False)[0]
    expected = direct_figures(model, data)
    assert figures["val/loss"] == pytest.approx(expected["val/loss"], abs=1e-6)
    assert figures["val/bits_per_byte"] == pytest.approx(expected["val/bits_per_byte"], abs=1e-6)


def test_full_perplexity_over_windows_equals_a_direct_sum(tmp_path: Path) -> None:
    """Story by story: 16 targets from the start, then 8 more at a time, each window seeing the 8 tokens before them."""
    data = stories(tmp_path)
    model, tokenizer, nats = language_model(data), data.tokenizer, []
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        for start in range(0, max(1, len(ids) - 1 - 8), 8):
            window = ids[start : start + 17]
            with torch.no_grad():
                logits = model(torch.tensor([window[:-1]]))[0]
            losses = F.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
            nats += losses[8 if start else 0 :].tolist()
    figures = trainer().validate(model, data, verbose=False)[0]
    assert len(nats) == int(model.sums.tokens)
    assert figures["val/loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-6)


def test_loss_that_is_no_number_is_not_hidden_by_the_sums() -> None:
    sums, ones = TokenSums(), torch.ones(4, dtype=torch.bool)
    sums.update(torch.tensor([1.0, 2.0, math.nan, math.inf]), ones, ones, ones.long())
    assert all(math.isnan(value) for value in sums.compute().values())
    sums.reset()
    sums.update(torch.tensor([1.0, 3.0, math.nan, 2.0]), torch.tensor([True, True, False, False]), ones, ones.long())
    assert sums.compute()["loss"] == 2.0


def test_full_perplexity_over_windows_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    losses = []
    for batch_size in (1, 3, 64):
        data = stories(tmp_path, eval_batch_size=batch_size)
        losses.append(trainer().validate(language_model(data), data, verbose=False)[0]["val/loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_gradient_accumulation_weighs_tokens_not_micro_batches(tmp_path: Path) -> None:
    """Stories of very different length: two micro-batches of one story must step as one batch of two."""
    weights = []
    for batch_size, accumulate in ((2, 1), (1, 2)):
        data = stories(tmp_path, batch_size=batch_size, seed=3)
        model = language_model(data, learning_rate=1e-2, schedule="constant", warmup_steps=0, eps=1e-2)
        trainer(max_steps=5, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(model, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=2e-6)


def test_training_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    data = stories(tmp_path, batch_size=5)
    model = language_model(data)
    other = stories(tmp_path, batch_size=5)  # a loader that has begun would have the training go on after its epoch
    other.setup("fit")
    batch = unpacked(next(iter(other.train_dataloader())))
    with torch.no_grad():
        logits = model(batch["input_ids"]).flatten(0, 1)
    nats = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    expected = (nats * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
    lightning = trainer(max_steps=1, limit_val_batches=0)
    lightning.fit(model, data)
    assert float(lightning.callback_metrics["train/loss"]) == pytest.approx(float(expected), abs=1e-6)


def test_checkpoint_loads_with_plain_values_only(tmp_path: Path) -> None:
    data = stories(tmp_path)
    model = language_model(data)
    lightning = trainer(max_steps=1, limit_val_batches=0)
    lightning.fit(model, data)
    lightning.save_checkpoint(tmp_path / "model.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.decoder.config == model.decoder.config
    ids = torch.arange(10)[None]
    assert torch.equal(again.eval()(ids), model.eval()(ids))


def test_only_matrices_decay() -> None:
    decay, rest = parameter_groups(LanguageModel(DecoderConfig(64, 8, 8, 1, 2)).parameters(), 0.1)
    assert decay["weight_decay"] == 0.1 and all(parameter.ndim == 2 for parameter in decay["params"])
    assert rest["weight_decay"] == 0.0 and all(parameter.ndim == 1 for parameter in rest["params"])
    assert len(decay["params"]) == 5 and len(rest["params"]) == 3


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 60: 0.6, 110: 0.2, 200: 0.2}),
        ("wsd", {0: 0.1, 9: 1.0, 54: 1.0, 55: 1.0, 82: 1 - 0.8 * 27 / 55, 110: 0.2, 200: 0.2}),
    ],
)
def test_schedule_goes_through_its_closed_form(schedule: str, expected: dict[int, float]) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_steps=10, final_ratio=0.2, decay_fraction=0.5)
    for step, factor in expected.items():
        assert learning_rate_factor(step, 110, config) == pytest.approx(factor)
