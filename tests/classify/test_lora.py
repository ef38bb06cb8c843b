"""The hand-written LoRA against PEFT: one function, one gradient, one course of training, one file format."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from classify.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_disabled,
    count_parameters,
    inject_lora,
    load_adapter,
    lora_layers,
    merge,
    read_adapter_config,
    save_adapter,
    train_only,
    unmerge,
)

# transformers 5.23 deprecates a property that peft 0.21 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_rslora": True, "use_dora": True},
    "random_B": {"init_lora_weights": False},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
dropouts = pytest.mark.parametrize("dropout", [0.0, 0.2])

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def tiny_bert(dropout: float = 0.0, **sizes) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        **(SIZES | sizes), num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def lora_config(variant: dict, dropout: float = 0.0, **values) -> LoRAConfig:
    return LoRAConfig(**({"r": 4, "lora_alpha": 8, "lora_dropout": dropout} | variant | values))


def custom_model(variant: dict, dropout: float = 0.0) -> nn.Module:
    model = tiny_bert(dropout)
    torch.manual_seed(1)
    inject_lora(model, lora_config(variant, dropout, modules_to_save=["classifier", "pooler"]))
    return model


def peft_model(variant: dict, dropout: float = 0.0) -> nn.Module:
    model = tiny_bert(dropout)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["query", "key", "value"],
        modules_to_save=["pooler"],
        **variant,
    )
    return peft.get_peft_model(model, config)


def batch(step: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    input_ids = torch.randint(1, 60, (4, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:2, 8:] = 0
    labels = torch.randint(0, 2, (4,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter, with PEFT's names brought to ours."""
    names = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            name = name.replace("magnitude_vector.default.weight", "magnitude_vector").replace(".default", "")
            names[name] = parameter
    return names


def train(model: nn.Module, steps: int) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(trained_weights(model).values(), lr=1e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(100 + step)  # the dropout masks
        loss = model(**batch(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).abs().max().item()
        assert difference <= atol, f"{name} differs by {difference}"


@variants
def test_one_seed_gives_the_weights_of_peft(variant):
    assert_same(trained_weights(custom_model(variant)), trained_weights(peft_model(variant)), atol=0)


@variants
@dropouts
def test_logits_and_gradients_equal_those_of_peft(variant, dropout):
    ours, theirs = custom_model(variant, dropout), peft_model(variant, dropout)
    generator = torch.Generator().manual_seed(2)
    others = trained_weights(theirs)
    with torch.no_grad():  # away from B = 0, where half of the gradients vanish
        for name, mine in trained_weights(ours).items():
            if "lora_" in name:
                mine += 0.1 * torch.randn(mine.shape, generator=generator)
                others[name].copy_(mine)
    gradients, logits = [], []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(3)
        output = model(**batch())
        output.loss.backward()
        gradients.append({name: p.grad for name, p in trained_weights(model).items()})
        logits.append(output.logits)
    assert_same(*gradients, atol=1e-6)
    torch.testing.assert_close(*logits, atol=1e-6, rtol=0)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


@variants
@dropouts
def test_twenty_optimizer_steps_end_in_the_losses_and_weights_of_peft(variant, dropout):
    ours, theirs = custom_model(variant, dropout), peft_model(variant, dropout)
    assert train(ours, 20) == pytest.approx(train(theirs, 20), abs=1e-6)
    assert_same(trained_weights(ours), trained_weights(theirs), atol=1e-5)
    torch.testing.assert_close(ours(**batch()).logits, theirs(**batch()).logits, atol=1e-6, rtol=0)


@variants
def test_the_layer_computes_the_formula(variant):
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer = LoRALinear(base, lora_config(variant))
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(torch.linspace(0.5, 2, 5))
    scaling = 8 / 2 if variant.get("use_rslora") else 8 / 4
    weight = base.weight + scaling * layer.lora_B.weight @ layer.lora_A.weight
    if variant.get("use_dora"):
        weight = layer.lora_magnitude_vector[:, None] * weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias, atol=1e-6, rtol=1e-6)


@variants
def test_merged_equals_unmerged_and_both_ways_repeat_without_effect(variant):
    model = custom_model(variant)
    train(model, 5)
    before, weights = model(**batch()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    merge(model)
    query = "bert.encoder.layer.0.attention.self.query.base_layer.weight"
    once = model.state_dict()[query].clone()
    merge(model)
    assert torch.equal(model.state_dict()[query], once)
    assert not torch.equal(weights[query], once)
    torch.testing.assert_close(model(**batch()).logits, before, atol=1e-6, rtol=0)
    unmerge(model)
    unmerge(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**batch()).logits, before)


@pytest.mark.parametrize("merged", [False, True])
def test_without_its_adapter_the_model_is_the_base_model_again(merged):
    model, base = custom_model({}), tiny_bert()
    train(model, 5)
    base.classifier.load_state_dict(model.classifier.state_dict())
    base.bert.pooler.load_state_dict(model.bert.pooler.state_dict())
    if merged:
        merge(model)
    adapted = model(**batch()).logits
    with adapter_disabled(model):
        assert torch.equal(model(**batch()).logits, base(**batch()).logits)
    assert torch.equal(model(**batch()).logits, adapted)
    assert all(layer.merged == merged for layer in lora_layers(model).values())


def test_only_adapters_and_named_modules_train_and_get_gradients():
    model = custom_model({})
    ours, every = count_parameters(model)
    assert ours == 2 * 3 * (4 * 32 + 32 * 4) + (32 * 2 + 2) + (32 * 32 + 32)
    assert every == ours + count_parameters(tiny_bert())[1] - (32 * 2 + 2) - (32 * 32 + 32)
    assert count_parameters(model) == peft_counts(peft_model({}))
    model(**batch()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def peft_counts(model) -> tuple[int, int]:
    trainable, total = model.get_nb_trainable_parameters()  # counts the untrained copies of saved modules too
    return trainable, total - (32 * 2 + 2) - (32 * 32 + 32)


@variants
def test_peft_loads_what_we_save(variant, tmp_path):
    model = custom_model(variant)
    train(model, 5)
    save_adapter(model, lora_config(variant, modules_to_save=["classifier", "pooler"]), tmp_path, "tiny")
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits, atol=1e-6, rtol=0)


@variants
def test_we_load_what_peft_saves(variant, tmp_path):
    model = peft_model(variant)
    train(model, 5)
    model.save_pretrained(tmp_path)
    loaded = tiny_bert()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded.eval()(**batch()).logits, model(**batch()).logits, atol=1e-6, rtol=0)
    assert read_adapter_config(tmp_path).use_dora == bool(variant.get("use_dora"))


def test_an_adapter_is_a_few_kilobytes_with_its_metadata(tmp_path):
    model = custom_model({})
    save_adapter(model, lora_config({}), tmp_path, metadata={"base": "abc"})
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    assert load_adapter(model, tmp_path)["base"] == "abc"


def test_targets_are_suffixes_of_names_or_one_pattern():
    assert inject_lora(tiny_bert(), lora_config({}, target_modules=["self.query"])) == [
        f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)
    ]
    assert inject_lora(tiny_bert(), lora_config({}, target_modules=r".*layer\.1\..*\.(query|value)")) == [
        f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "value")
    ]


@pytest.mark.parametrize("targets", [["query", "keys"], "query", "(", ["attention"]])
def test_targets_that_match_no_linear_layer_are_named_with_those_there_are(targets):
    with pytest.raises(ValueError, match=r"(?s)target_modules.*(query|regular expression)"):
        inject_lora(tiny_bert(), lora_config({}, target_modules=targets))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "rank"),
        ({"r": -1}, "rank"),
        ({"lora_alpha": 0}, "alpha"),
        ({"lora_dropout": 1.0}, "dropout"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**values)


def test_a_second_injection_and_an_unknown_module_to_save_are_refused():
    with pytest.raises(ValueError, match="already"):
        inject_lora(custom_model({}), lora_config({}))
    with pytest.raises(ValueError, match="classifier"):
        train_only(tiny_bert(), ["score"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_bert(hidden_size=48), "shape"),
        (lambda: tiny_bert(num_hidden_layers=3), "lacks"),
        (lambda: tiny_bert(num_hidden_layers=1), "another base model"),
        (lambda: injected(tiny_bert(), r=2), "rank"),
        (lambda: injected(tiny_bert(), lora_alpha=4), "scale"),
        (lambda: injected(tiny_bert(), use_dora=True), "lacks"),
    ],
    ids=["wider", "deeper", "shallower", "rank", "scale", "dora"],
)
def test_an_adapter_that_does_not_fit_is_refused(model, message, tmp_path):
    save_adapter(custom_model({}), lora_config({}, modules_to_save=["classifier", "pooler"]), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_adapter(model(), tmp_path)


def injected(model: nn.Module, **values) -> nn.Module:
    inject_lora(model, lora_config({}, modules_to_save=["classifier", "pooler"], **values))
    return model


def test_damaged_and_foreign_adapter_files_are_refused(tmp_path):
    save_adapter(custom_model({}), lora_config({}), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    content = json.loads(config.read_text())
    changes = [{"peft_type": "IA3"}, {"bias": "all"}, {"rank_pattern": {"query": 2}}]
    for change in [*changes, {"r": 10**9}, {"r": "4"}, {"r": 0}]:
        config.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=next(iter(change)) if "r" not in change else "rank|type"):
            load_adapter(tiny_bert(), tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="adapter_config"):
        load_adapter(tiny_bert(), tmp_path)
    config.write_text(json.dumps(content))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="safetensors"):
        load_adapter(tiny_bert(), tmp_path)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="lacks"):
        load_adapter(tiny_bert(), tmp_path)
