"""Between two logged steps the host waits for nothing and processes meet once; gradients are those of the mean loss."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from experiment.compat.lightning import is_accumulating
from experiment.runs.not_finite import failed_batch
from experiment.runs.step_sums import StepModule, StepSums
from lm.__main__ import main
from lm.data.module import TextDataModule
from lm.model import loss
from lm.model.config import DecoderConfig
from lm.training.module import LanguageModel
from tests.processes import Commands
from tests.runs import TINY, rows, torchrun, write_stories
from tests.windows import unpacked

# What on a GPU makes the host wait: a number asked for, a shape that depends on numbers, memory that is not pinned.
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
WAITS |= {"tensor", "as_tensor", "from_numpy", "masked_select", "equal", "allclose", "unique", "pin_memory"}
RUN = [
    "--data.batch_size=1",
    "--trainer.val_check_interval=1000",
    "--checkpoint.every_n_steps=1000",
    "--samples.every_n_steps=0",
]
RUN += ["--trainer.log_every_n_steps=6", "--trainer.max_steps=12", "--run_dir=run", "--trainer.gradient_clip_val=1"]


class Waits(TorchFunctionMode):
    """Notes what is called from Python."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if getattr(func, "__name__", "") in WAITS:
            self.events.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Notes what is called from C++ too: numbers asked for, and what processes do together."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "c10d" or func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            self.events.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def events_of_steps(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """What was noted in each optimizer step of a run, from the end of the one before, as if it ran on a GPU."""
    events: list[str] = []
    steps: dict[int, list[str]] = {}

    def on_train_batch_end(self, *args: Any) -> None:
        ended(self, *args)
        if not is_accumulating(self.trainer):
            steps[self.trainer.global_step] = list(events)
            events.clear()

    ended = StepModule.on_train_batch_end
    monkeypatch.setattr(StepModule, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(StepModule, "reading_is_free", False)
    with Waits(events), Dispatched(events):
        main(["fit", *arguments])
    return steps


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--trainer.accumulate_grad_batches=2"],
        ["--model.optimizer.muon_learning_rate=0.02", "--data.packing=true"],
    ],
)
def test_the_host_waits_for_the_device_at_logged_steps_only(
    extra: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, *RUN, *extra]
    monkeypatch.setattr(loss, "_on_cpu", lambda hidden: False)
    steps = events_of_steps(arguments, monkeypatch)
    assert list(steps) == list(range(1, 13))
    for step in range(2, 13):  # before the first, everything is set up
        assert steps[step] == [] or step % 6 == 0, (step, steps[step])
    assert "tolist" in steps[6]
    assert [row["step"] for row in rows(Path("run"))] == ["6", "12"]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_processes_meet_once_a_step_beside_their_gradients(
    accumulate: int, in_tmp: Path, commands: Commands
) -> None:
    arguments = ["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, *RUN, "--trainer.max_steps=3"]
    arguments += ["--trainer.strategy=ddp", "--trainer.devices=2", f"--trainer.accumulate_grad_batches={accumulate}"]
    processes = [
        commands.start(f"{rank}.json", *arguments, package="tests.collectives", env=env)
        for rank, env in enumerate(torchrun())
    ]
    for rank, process in enumerate(processes):
        assert process.wait() == 0, process.output
        taken = json.loads(Path(f"{rank}.json").read_text())
        assert taken["2"] == taken["3"] == ["all_reduce"]


class Seen(Callback):
    """Keeps what a callback is shown."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.batches: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = copy.deepcopy(pl_module.decoder)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.decoder.named_parameters()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.batches.append(unpacked(batch))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_callback_sees_the_loss_and_the_gradients_of_the_mean(accumulate: int, in_tmp: Path) -> None:
    torch.manual_seed(0)
    data = TextDataModule(str(write_stories(in_tmp / "stories")), vocab_size=345, sequence_length=64, batch_size=2)
    model = LanguageModel(DecoderConfig(data.num_tokens, 16, 24, 1, 2, max_sequence_length=64))
    seen = Seen()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1,
        enable_model_summary=False, callbacks=[seen], accumulate_grad_batches=accumulate, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, data)
    sums, counts = [], []
    for batch in seen.batches:
        nats = F.cross_entropy(
            seen.before(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten(), reduction="none"
        )
        sums.append((nats * batch["loss_mask"].flatten()).sum())
        counts.append(batch["loss_mask"].sum())
    assert len(set(map(float, counts))) == accumulate  # of different lengths
    means = [float((total / count).detach()) / accumulate for total, count in zip(sums, counts, strict=True)]
    assert seen.losses == pytest.approx(means, rel=1e-5)
    (sum(sums) / sum(counts)).backward()
    (found,) = seen.gradients
    for name, parameter in seen.before.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-7, rtol=1e-4)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(
        float((sum(sums) / sum(counts)).detach()), rel=1e-5
    )


def test_tokens_are_counted_exactly_where_float32_is_not() -> None:
    sums = StepSums("loss")
    for step in range(1, 4):
        sums.add(step, step, torch.tensor(2**24 - 1), torch.tensor(1.0))
        sums.finish(step)
    sums.read()
    assert sums.count == 3 * (2**24 - 1)


def test_the_first_loss_that_is_no_number_is_found_late_with_its_batch() -> None:
    sums = StepSums("loss")
    for batch in range(8):  # two a step
        loss = math.nan if batch == 3 else math.inf if batch == 6 else 1.0
        sums.add(batch // 2 + 1, batch, torch.tensor(1), torch.tensor(loss))
        if batch % 2:
            sums.finish(batch // 2 + 1)
    sums.read()
    assert sums.failed_step == 2
    assert failed_batch(sums)[0] == 3
