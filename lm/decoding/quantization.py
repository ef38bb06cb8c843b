"""Weights prepared for decoding on a CPU: read at full memory bandwidth, or stored in fewer bytes.

Decoding one story multiplies every matrix by one row per token, so it is limited by memory bandwidth. Three formats of
the matrices (norms and the embedding stay float32):

- float32: for one row, compiled code reads four parts of the matrix at once, since one address stream does not fill
  the bandwidth (the head on two cores with AVX2: 43 GB/s instead of 18); otherwise oneDNN packs the matrix once, 1.8
  to 2.5 times as fast as `F.linear` at 8 to 32 rows, and three times with one row on an AMD CPU, where `F.linear` is
  slow (see docs/speed.md).
- bfloat16: rounded, multiplied in float32 where compiled.
- int8: `round(w / scale)` with one scale an output channel, its largest magnitude / 127 (symmetric, weight-only);
  multiplied in float32 where compiled for one row, else by a factor in bfloat16.

Perplexity of stories260K on 300 validation stories (105,751 tokens): 3.6813 in float32, 3.6814 in bfloat16, 3.6854 in
int8.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.compat.torch import int8_product, pack_matrix, packed_product
from lm.model.config import WeightDtype
from lm.model.decoder import Decoder

STREAMS = 4  # more is not faster
BLOCK = 32  # int8 elements


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) as an int8 matrix (N, K) times float32 scales (N,): the largest magnitude of a row becomes 127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(-1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().to(torch.int8), scale


@torch.library.custom_op("tinylab::packed_product", mutates_args=())
def _packed_product(rows: Tensor, packed: Tensor, height: int) -> Tensor:
    """(n, height) of rows (n, K) and a matrix packed by oneDNN, which is opaque to torch.compile."""
    return packed_product(rows, packed)


@_packed_product.register_fake
def _(rows: Tensor, packed: Tensor, height: int) -> Tensor:
    return rows.new_empty(len(rows), height)


class DecodingLinear(nn.Module):
    """`x @ weight.T` without gradient, with the matrix in a fast format.

    Args:
        weight: (N, K), float32; shared, not copied, where the format is float32.
        format: See the module's docstring.
    """

    def __init__(self, weight: Tensor, format: WeightDtype) -> None:
        super().__init__()
        self.format = format
        self.packed: Tensor | None = None
        if format == "int8":
            quantized, scale = quantize(weight)
            # torch's kernel reads whole blocks, past the end of a row that is not a multiple of them.
            self.padding = -weight.shape[1] % BLOCK
            weight, scale = F.pad(quantized, (0, self.padding)), scale.bfloat16()
        else:
            weight, scale = weight.detach().to(getattr(torch, format)), None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def pack(self) -> None:
        """Copy the matrix into oneDNN's layout, for products of several rows or without compilation."""
        if self.packed is None and self.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            self.packed = pack_matrix(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) in float32 of x (..., K)."""
        rows = x.flatten(0, -2)
        if self.scale is not None and self.padding:
            rows = F.pad(rows, (0, self.padding))
        if len(rows) == 1 and torch.compiler.is_compiling():
            product = torch.cat([(part.float() * rows).sum(-1) for part in self.weight.chunk(STREAMS)])
            product = product if self.scale is None else product * self.scale.float()
        elif self.scale is not None:
            product = int8_product(rows.bfloat16(), self.weight, self.scale).float()
        elif self.packed is not None:
            product = _packed_product(rows, self.packed, len(self.weight))
        else:
            product = F.linear(rows.to(self.weight.dtype), self.weight).float()
        return product.view(*x.shape[:-1], -1)


def weight_dtype(decoder: Decoder) -> WeightDtype | None:
    """The format of a decoder made by `prepare_for_decoding`; None for others."""
    layer = decoder.blocks[0].attention.qkv
    return layer.format if isinstance(layer, DecodingLinear) else None


def prepare_for_decoding(decoder: Decoder, format: WeightDtype = "float32", pack: bool = False) -> Decoder:
    """A copy of the decoder for faster decoding only.

    Args:
        decoder: On a CPU, in float32; not changed. A prepared one is returned in its own format.
        format: Of its matrices: float32 is exact and shares them.
        pack: Also pack float32 matrices, for several rows and uncompiled code: a copy, 2 ms a million weights.

    Raises:
        ValueError: If the weights are not float32 on a CPU.
    """
    if weight_dtype(decoder) is None:
        weight = decoder.embedding.weight
        if (weight.dtype, weight.device.type) != (torch.float32, "cpu"):
            raise ValueError(
                f"weight_dtype={format}: the decoder is {weight.dtype} on {weight.device.type}, expected float32 on a "
                "CPU; leave weight_dtype out"
            )
        shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
        head_weight = decoder.head_weight
        decoder = copy.deepcopy(decoder, shared).eval()
        decoder.head = DecodingLinear(head_weight, format)
        for block in decoder.blocks:
            for part in (block.attention, block.feed_forward):
                for name, layer in list(part.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(part, name, DecodingLinear(layer.weight, format))
    if pack:
        for module in decoder.modules():
            if isinstance(module, DecodingLinear):
                module.pack()
    return decoder
