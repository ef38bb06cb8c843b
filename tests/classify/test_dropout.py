"""FastDropout drops as nn.Dropout does."""

import pytest
import torch
from torch import nn

from classify.dropout import FastDropout, use_fast_dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1_000_000,), (1001, 999)])
def test_it_drops_the_asked_share_and_keeps_the_mean(p, shape):
    torch.manual_seed(0)
    result = FastDropout(p)(torch.ones(shape))
    deviation = (p * (1 - p) / result.numel()) ** 0.5
    assert abs((result == 0).double().mean() - p) < 4 * deviation + 1 / 65_536
    kept = result[result != 0]
    assert kept.unique().numel() == 1
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=1e-3)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (FastDropout(0.5)(torch.ones(1_000_000)) == 0).double()
    for distance in range(1, 9):
        both = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert both == pytest.approx(0.25, abs=0.003), distance


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(50, 7, requires_grad=True)
    result = FastDropout(0.3)(x)
    result.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), result.detach())


def test_the_seed_repeats_it_and_evaluation_is_the_identity():
    layer, x = FastDropout(0.3), torch.randn(1000)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(layer(x))
    assert torch.equal(*results)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(FastDropout(0.0)(x), x)
    assert torch.equal(FastDropout(1.0)(x), torch.zeros(1000))


def test_every_dropout_of_a_model_is_replaced_with_its_probability_and_mode():
    model = nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.4))).eval()
    use_fast_dropout(model)
    assert [(type(m), m.p, m.training) for m in (model[0], model[1][1])] == [
        (FastDropout, 0.2, False),
        (FastDropout, 0.4, False),
    ]
