"""The hand-written LoRA against PEFT: one function, one gradient, one course of training."""

import pytest
import torch
from torch import nn

from experiment.nn.lora import LoRALinear
from experiment.nn.lora_config import LoRAConfig
from experiment.nn.lora_models import (
    adapter_disabled,
    count_parameters,
    inject_lora,
    lora_layers,
    merge,
    train_only,
    unmerge,
)
from tests.experiment.adapted import (
    batch,
    custom_model,
    lora_config,
    peft_model,
    tiny_bert,
    train,
    trained_weights,
    variants,
)

# transformers 5.23 deprecates a property that peft 0.21 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

dropouts = pytest.mark.parametrize("dropout", [0.0, 0.2])


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


@dropouts
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_losses_and_weights_of_training_are_those_of_peft_to_the_bit(dropout, precision):
    ours, theirs = custom_model({}, dropout), peft_model({}, dropout)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        assert train(ours, 5) == train(theirs, 5)
    assert_same(trained_weights(ours), trained_weights(theirs), atol=0)


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
