"""The loss of a batch as one compiled function is that of the plain code."""

from functools import partial

import pytest
import torch

from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder
from lm.model.loss import summed_loss
from lm.training.compiled_loss import CompiledLoss


@pytest.mark.parametrize("config", [{}, {"query_key_norm": True, "value_residual": True, "tie_embeddings": False}])
def test_one_function_from_batch_to_loss_gives_the_loss_and_gradients_of_the_plain_code(
    config: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced whole, without a break, and run by torch's own kernels; the last batch is smaller."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=keep))
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(300, 32, 48, 2, 4, num_kv_heads=2, max_sequence_length=24, **config))
    compiled = CompiledLoss(decoder, use_graphs=False)
    for rows in (5, 5, 3):
        tokens = torch.randint(300, (rows, 25), dtype=torch.int32)
        loss_mask = torch.rand(rows, 24) > 0.3
        found = []
        for function in (compiled, partial(summed_loss, decoder)):
            decoder.zero_grad()
            loss, count = function(tokens, loss_mask)
            loss.backward()
            found.append((loss, count, *(parameter.grad for parameter in decoder.parameters())))
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
        assert int(found[0][1]) == int(loss_mask.sum())
    assert len(graphs) == 1  # code for one shape serves all
