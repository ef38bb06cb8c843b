"""Figures of speed mean what they say, by a clock that goes only when something happens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import experiment.runs.throughput
import experiment.sources.batches
from experiment.nn.peak_flops import peak_flops
from experiment.pages.summary import read_metrics
from experiment.runs.throughput import Stopwatch
from lm.__main__ import main
from lm.data.corpus import WindowBatches
from lm.model.config import DecoderConfig
from lm.training.callbacks import Samples
from lm.training.module import LanguageModel
from tests.runs import TINY, write_stories


class Clock:
    """Its seconds pass when one of ``costs`` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: dict[tuple[type, str], float]) -> None:
        self.seconds = 0.0
        for module in (experiment.sources.batches, experiment.runs.throughput):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.seconds))
        for (owner, name), cost in costs.items():
            monkeypatch.setattr(owner, name, self._costing(getattr(owner, name), cost))

    def _costing(self, function: Any, cost: float) -> Any:
        def costly(*args: Any, **kwargs: Any) -> Any:
            self.seconds += cost
            return function(*args, **kwargs)

        return costly


def test_waiting_for_data_is_training_and_validation_samples_and_saving_are_not(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {
        (WindowBatches, "__getitem__"): 1,
        (LanguageModel, "training_step"): 4,
        (LanguageModel, "validation_step"): 1000,
        (Samples, "write"): 100,
    }
    Clock(monkeypatch, costs)
    arguments = [f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--trainer.gradient_clip_val=1"]
    arguments += ["--trainer.max_steps=12", "--trainer.log_every_n_steps=4", "--run_dir=run"]
    main(["fit", *arguments])
    logged = [row for row in read_metrics(Path("run")) if "train/loss" in row]
    assert [row["step"] for row in logged] == [4, 8, 12]
    before = 0
    for row in logged:
        assert row["train/step_seconds"] == pytest.approx(5)
        assert row["train/data_seconds"] == pytest.approx(1)
        assert row["train/tokens_per_second"] == pytest.approx((row["train/tokens"] - before) / 20)
        assert row["train/gradient_norm"] > 0
        before = row["train/tokens"]


def test_pauses_within_each_other_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, {})
    watch = Stopwatch()
    clock.seconds += 2
    with watch:
        clock.seconds += 10
        with watch:
            clock.seconds += 20
    clock.seconds += 3
    assert watch.seconds == 5


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_a_token_are_those_of_its_products(tied: bool) -> None:
    """Counted by torch, forward and backward, of attention in plain products, none of which the mask saves."""
    config = DecoderConfig(512, 64, 160, 3, 4, max_sequence_length=64, tie_embeddings=tied)
    model = LanguageModel(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, 64, dtype=torch.int64)).sum().backward()
    assert model.flops_per_token(64) == pytest.approx(counter.get_total_flops() / 128, rel=0.01)


def test_a_gpu_that_is_not_known_has_no_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "16-mixed") == 756e12
    assert peak_flops("NVIDIA L40S", "bf16-true") == 362e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "32-true") is None
    assert peak_flops("Tesla K80", "bf16-mixed") is None
