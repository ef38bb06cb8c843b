"""The optimizers against torch's own."""

import copy

import torch

from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder
from lm.training.muon import Muon, orthogonalize
from lm.training.optim import OptimizerConfig, make_optimizer

SHAPE = DecoderConfig(97, 48, 80, 2, 6, num_kv_heads=2, max_sequence_length=32)


def draw_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_equals_torch() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 40), (40, 24), (24, 40), (16, 16))]
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = Muon(ours, dtype=torch.bfloat16, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            draw_gradients(parameters, step)
            optimizer.step()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0.05 * 4 * 0.02)  # bfloat16's rounding of updates


def test_orthogonalized_matrix_keeps_its_singular_vectors() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 50, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ orthogonalize(matrices, torch.float64) @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-10)
    assert (diagonal > 0.6).all() and (diagonal < 1.3).all()


def test_stacked_matrices_are_orthogonalized_each_by_itself() -> None:
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(20, 12))
    apart = [torch.nn.Parameter(part.clone()) for part in stacked.detach().split([12, 4, 4])]
    stacked.grad = torch.randn(20, 12)
    for parameter, grad in zip(apart, stacked.grad.split([12, 4, 4]), strict=True):
        parameter.grad = grad
    Muon([{"params": [stacked], "rows": [12, 4, 4]}], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(stacked.detach(), torch.cat([part.detach() for part in apart]), rtol=0, atol=1e-6)


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    decoder = Decoder(SHAPE)
    plain = copy.deepcopy(decoder)
    config = {"learning_rate": 0.01, "weight_decay": 0.1}
    for model, muon in ((decoder, 0.02), (plain, None)):
        draw_gradients(model.parameters(), 1)
        make_optimizer(model, OptimizerConfig(muon_learning_rate=muon, **config)).step()
    for (name, ours), adamw in zip(decoder.named_parameters(), plain.parameters(), strict=True):
        is_block_matrix = name.startswith("blocks.") and ours.ndim == 2
        assert torch.equal(ours, adamw) != is_block_matrix, name


def test_joint_optimizer_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(learning_rate=0.01, muon_learning_rate=0.02)
    decoder = Decoder(SHAPE)
    optimizer = make_optimizer(decoder, config)
    for step in range(2):
        draw_gradients(decoder.parameters(), step)
        optimizer.step()
    again = copy.deepcopy(decoder)
    resumed = make_optimizer(again, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, moved in ((decoder, optimizer), (again, resumed)):
        for group in moved.param_groups:
            group["lr"] *= 0.5  # as a schedule does
        draw_gradients(model.parameters(), 9)
        moved.step()
    for ours, theirs in zip(decoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(optimizer.state[parameter] for parameter in decoder.parameters())
