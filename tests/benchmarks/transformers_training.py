"""transformers' Llama and Trainer as a contender, and what it has in common with ours. Imports nothing of ours that it
would not need, since its memory is measured."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from common import Turns
from torch.utils.data import Dataset
from trainers import transformers_trainer

from experiment.quiet import quiet_libraries
from lm.formats.hugging_face import split_weights
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder


@dataclass(frozen=True)
class Work:
    """What is trained, and how much of it makes one measurement."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    batch_size: int = 32
    length: int = 128
    precision: str = "32-true"
    steps: int = 2  # of a measurement
    warmup: int = 4  # the first steps fault memory in, and compile
    adapter: str | None = None  # folder of the one to train, in PEFT's format; None trains all weights
    ids_file: str | None = None  # of numpy, (rows, length); None draws them
    learning_rate: float = 6e-4

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.length

    @property
    def ids(self) -> torch.Tensor:
        """Rows of token ids, the same for every contender; drawn ones are as unequally frequent as words."""
        if self.ids_file is not None:
            return torch.from_numpy(np.load(self.ids_file))
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(4096, self.length, generator=generator, dtype=torch.float64)
        return (self.decoder.vocab_size**places).long() - 1


class Tokens(Dataset):
    """The rows of token ids as transformers takes them."""

    def __init__(self, work: Work) -> None:
        self.ids = work.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def transformers_llama(config: DecoderConfig) -> torch.nn.Module:
    """transformers' Llama with the weights that our decoder starts from under seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    decoder = Decoder(config)
    described = asdict(config)
    described |= {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }
    names = ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")
    kept = {name: value for name, value in described.items() if name in names or not hasattr(config, name)}
    model = LlamaForCausalLM(LlamaConfig(**kept))
    missing, unexpected = model.load_state_dict(split_weights(decoder), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


def told(measured: Callable[..., None], model: torch.nn.Module) -> Callable[..., None]:
    """``measured`` that also tells how many weights of the model train."""
    return partial(measured, trained=sum(weight.numel() for weight in model.parameters() if weight.requires_grad))


def train_llama(measured: Callable[..., None], work: Work, compile: bool = False) -> None:
    """transformers' Llama, with PEFT's adapter where the work has one, and Trainer as their examples have it, with the
    same optimizer and clipping; compiled where asked for, by the Trainer's own switch."""
    quiet_libraries()
    model = transformers_llama(work.decoder)
    if work.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, work.adapter, is_trainable=True)
    transformers_trainer(
        model, Tokens(work), Turns(told(measured, model), work.steps, work.warmup), work.tokens,
        bf16=work.precision == "bf16-mixed", per_device_train_batch_size=work.batch_size,
        train_sampling_strategy="sequential", learning_rate=work.learning_rate, lr_scheduler_type="constant",
        weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, torch_compile=compile,
    )  # fmt: skip
