"""A tiny BERT adapted by hand and by PEFT, from the same seeds, and trained alike."""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from experiment.nn.lora_config import LoRAConfig
from experiment.nn.lora_models import inject_lora

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_rslora": True, "use_dora": True},
    "random_B": {"init_lora_weights": False},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())

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
    default = {"target_modules": ["query", "key", "value"], "modules_to_save": ["classifier"]}
    return LoRAConfig(**({"r": 4, "lora_alpha": 8, "lora_dropout": dropout} | default | variant | values))


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
