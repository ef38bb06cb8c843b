"""Adapters as files: PEFT reads ours, we read PEFT's, and what does not fit is refused."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from experiment.nn.adapter_files import load_adapter, read_adapter_config, save_adapter
from experiment.nn.lora_models import inject_lora
from tests.experiment.adapted import batch, custom_model, lora_config, peft_model, tiny_bert, train, variants

# transformers 5.23 deprecates a property that peft 0.21 asks for.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


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
