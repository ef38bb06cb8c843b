"""Small decoders and tokenizers that tests of files share."""

import random

import pytest
import torch

from experiment.errors import InputError
from lm.data.bpe import train_tokenizer
from lm.data.demo_stories import write_story
from lm.data.tokenizer import StoryTokenizer
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder

VOCAB_SIZE = 400


def make_tokenizer(vocab_size: int) -> StoryTokenizer:
    draw = random.Random(0)
    return train_tokenizer([write_story(draw) for _ in range(300)], vocab_size)


def make_decoder(vocab_size: int = VOCAB_SIZE, **changes) -> Decoder:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "max_sequence_length": 64,
    }
    decoder = Decoder(DecoderConfig(vocab_size=vocab_size, **{**shape, **changes})).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:  # a tied model repeats its last token unless its blocks outweigh the embedding
                parameter.mul_(6.0 if name == "embedding.weight" else 20.0)
    return decoder


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(model, Decoder) else output.logits


def random_ids(length: int = 20) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(1))


def assert_refused(function, *arguments, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
