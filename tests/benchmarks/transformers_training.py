"""transformers' Llama and Trainer as a contender, and what it has in common with ours. Imports nothing of ours that it
would not need, since its memory is measured."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from common import DEVICE, Turns
from torch.utils.data import Dataset

from experiment.quiet import quiet_libraries
from lm.formats.hugging_face import split_weights
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder

LEARNING_RATE = 6e-4


@dataclass(frozen=True)
class Work:
    """What is trained, and how much of it makes one measurement."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    batch_size: int = 32
    length: int = 128
    precision: str = "32-true"
    steps: int = 2  # of a measurement
    warmup: int = 4  # the first steps fault memory in, and compile

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.length


class Tokens(Dataset):
    """Token ids whose frequencies fall as those of words do, the same for every contender."""

    def __init__(self, work: Work, rows: int = 4096) -> None:
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(rows, work.length, generator=generator, dtype=torch.float64)
        self.ids = (work.decoder.vocab_size**places).long() - 1

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


def transformers_trainer(measured: Callable[..., None], work: Work, compile: bool = False) -> None:
    """transformers' Llama and Trainer as their examples have it, with the same optimizer and clipping; compiled where
    asked for, by the Trainer's own switch."""
    quiet_libraries()
    import transformers

    turns = Turns(measured, work.steps, work.warmup)

    class TrainerTurns(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                turns.step(work.tokens * work.steps, logs["loss"], work.steps)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=DEVICE == "cpu",
            bf16=work.precision == "bf16-mixed",
            per_device_train_batch_size=work.batch_size,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            max_steps=10**6,
            logging_steps=work.steps,
            torch_compile=compile,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = transformers_llama(work.decoder)
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=Tokens(work), callbacks=[TrainerTurns()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
