"""transformers' encoder with our attention in its place against transformers' own."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import experiment.nn.attention
from classify.attention import NAME
from classify.pretrained import load_classifier


def outcome(model, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits of two reviews of different lengths, and the gradients of every weight."""
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    model.eval().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask).logits
    gradients = torch.autograd.grad(logits.float().sin().sum(), list(model.parameters()))
    return [logits, *gradients]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.bfloat16, 2e-2)])
def test_logits_and_gradients_equal_those_of_transformers(dtype, tolerance, tiny_bert, monkeypatch):
    calls = []
    apply = experiment.nn.attention._Attention.apply
    monkeypatch.setattr(experiment.nn.attention._Attention, "apply", lambda *args: calls.append(1) or apply(*args))
    ours, _ = load_classifier(str(tiny_bert), ["negative", "positive"], attention_dropout=0.0)
    assert ours.config._attn_implementation == NAME
    theirs = AutoModelForSequenceClassification.from_pretrained(tiny_bert, attn_implementation="sdpa", num_labels=2)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(1))
    left, right = outcome(ours, dtype), outcome(theirs, dtype)
    assert len(calls) == (2 if dtype == torch.bfloat16 else 0)  # layers
    scale = max(tensor.norm() for tensor in right)
    for a, b in zip(left, right, strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm(), 1e-2 * scale)
