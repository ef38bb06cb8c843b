"""The decoder's weights sharded among processes by PyTorch's fully_shard (FSDP2)."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from lm.model.decoder import Decoder


def shard(decoder: Decoder, mesh: DeviceMesh, bfloat16: bool, device: torch.device) -> None:
    """Shard a decoder, in place.

    Args:
        decoder: If on the meta device, it gets the weights that a single process would draw.
        mesh: The processes.
        bfloat16: Gather and multiply weights in bfloat16; gradients are summed in float32.
        device: Of this process's shard.
    """
    policy = MixedPrecisionPolicy()
    if bfloat16:
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        decoder.embedding.register_forward_hook(lambda module, inputs, x: x.float())  # the residual stream's type
    for module in (*decoder.blocks, decoder):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(decoder, "hidden_states")
    if decoder.embedding.weight.is_meta:
        _draw_weights(decoder, device)


@torch.no_grad()
def _draw_weights(decoder: Decoder, device: torch.device) -> None:
    """Draw this process's shard, one whole matrix at a time: the values that a single process would draw."""
    decoder.to_empty(device=device)
    decoder.set_rotary_tables()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        for module in decoder.modules():  # torch's own values, which ours replace, come first
            if isinstance(module, nn.Embedding):
                nn.Embedding(module.num_embeddings, module.embedding_dim)
            elif isinstance(module, nn.Linear):
                nn.Linear(module.in_features, module.out_features, bias=False)
        for name, parameter in decoder.named_parameters():
            whole = decoder.draw(name, torch.empty(parameter.shape)).to(device)
            share = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(share.to_local())
