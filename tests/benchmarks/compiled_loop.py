"""A compiled model in a training loop that does nothing else, as nanoGPT has it: the least that one can do, and what a
user would write by hand."""

import math
from collections.abc import Callable, Iterator
from itertools import count

import torch
import torch.nn.functional as F
from common import DEVICE, Turns
from torch import Tensor, nn
from transformers_training import Work

from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder


def litgpt(config: DecoderConfig) -> nn.Module:
    """litgpt's GPT of the same shape, with weights of its own."""
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(
        Config(
            block_size=config.max_sequence_length,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_query_groups=config.kv_heads,
            n_embd=config.hidden_size,
            intermediate_size=config.intermediate_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=config.rms_norm_eps,
            mlp_class_name="LLaMAMLP",
        )
    )
    model.lm_head.weight = model.transformer.wte.weight
    nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def batches(work: Work) -> Iterator[Tensor]:
    """Ids (batch_size, length) in the order of every contender."""
    ids = work.ids
    ids = ids.pin_memory() if DEVICE == "cuda" else ids
    for step in count():
        begin = step * work.batch_size % len(ids)
        yield ids[begin : begin + work.batch_size].to(DEVICE, non_blocking=True)


def compiled_loop(measured: Callable[..., None], work: Work, model: str = "decoder") -> None:
    """Trains our decoder or litgpt's GPT whole under torch.compile, loss included, with the same optimizer and
    clipping."""
    torch.manual_seed(0)
    net = (litgpt if model == "litgpt" else Decoder)(work.decoder).to(DEVICE)
    matrices = [parameter for parameter in net.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in net.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=work.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.compile
    def mean_loss(ids: Tensor) -> Tensor:
        logits = net(ids)[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten())

    turns, expected = Turns(measured, work.steps, work.warmup), math.log(work.decoder.vocab_size)
    for step, ids in enumerate(batches(work)):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=work.precision == "bf16-mixed"):
            loss = mean_loss(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if step == 0 and abs(float(loss) - expected) > 1:
            raise AssertionError(f"the first loss of {model} is {float(loss)}, expected about {expected}")
        turns.step(work.tokens, loss)
