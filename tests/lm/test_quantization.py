"""Weights laid out for decoding against the plain ones, and int8 against its definition."""

import pytest
import torch

from lm.decoding.generation import generate
from lm.decoding.quantization import DecodingLinear, prepare_for_decoding, quantize
from lm.model.config import DecoderConfig, GenerationConfig
from lm.model.decoder import Decoder


def make_decoder(**changes) -> Decoder:
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4}
    decoder = Decoder(DecoderConfig(**{**shape, **changes}, max_sequence_length=32)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(5.0 if parameter.ndim == 2 else 1.0)
    return decoder


def test_quantization_is_off_by_half_a_step_at_most():
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
    weight[3] = 0
    quantized, scale = quantize(weight)
    assert quantized.dtype == torch.int8
    assert quantized.abs().amax(-1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    error = (quantized * scale[:, None] - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert (error.amax(-1) > 0.3 * scale)[weight.any(-1)].all()  # a wider type would be nearer


@pytest.mark.parametrize(("format", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.01), ("int8", 0.02)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [64, 172, 33])  # an odd number of them once ended the process
def test_products_stay_near_those_of_the_plain_matrix(format, tolerance, rows, columns):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(61, columns, generator=generator), torch.randn(rows, columns, generator=generator)
    layer = DecodingLinear(weight, format)
    layer.pack()
    expected = x @ weight.T
    product = layer(x)
    assert product.dtype == torch.float32
    assert (product - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_prepared_decoder_shares_its_weights_and_gives_the_same_logits(tie_embeddings):
    decoder = make_decoder(tie_embeddings=tie_embeddings, num_kv_heads=2)
    prepared = prepare_for_decoding(decoder, pack=True)
    assert prepare_for_decoding(prepared, "int8") is prepared
    assert prepared.blocks[0].attention.qkv.weight.data_ptr() == decoder.blocks[0].attention.qkv.weight.data_ptr()
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        torch.testing.assert_close(prepared(ids), decoder(ids), rtol=1e-5, atol=1e-5)
        rounded = prepare_for_decoding(decoder, "int8")(ids)
        error = (rounded - decoder(ids)).norm() / decoder(ids).norm()
    assert 1e-4 < error < 0.05


def test_prompts_of_several_rows_and_formats_decode():
    decoder = make_decoder()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    stories = {}
    for weights in (None, "float32", "bfloat16", "int8"):
        config = GenerationConfig(temperature=0, max_new_tokens=20, weight_dtype=weights)
        stories[weights] = [result.token_ids for result in generate(decoder, [[1, 2, 3], [1, 7]], config)]
    assert stories[None] == stories["float32"]
    assert all(len(story) == 20 for of_one in stories.values() for story in of_one)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_a_decoder_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"weight_dtype=int8: the decoder is torch\.float64") as error:
        prepare_for_decoding(make_decoder().double(), "int8")
    assert "\n" not in str(error.value)
