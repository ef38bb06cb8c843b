"""The language model's LightningModule: training, perplexity evaluation, and generation."""

import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchmetrics import Metric

from experiment.console import console
from experiment.errors import InputError
from experiment.nn.hardware import can_compile, fast_bfloat16
from experiment.nn.lora_config import LoRAConfig
from experiment.runs.step_sums import StepModule
from lm.model.config import DecoderConfig, GenerationConfig, Variant
from lm.model.decoder import Decoder
from lm.model.loss import has_plain_head, summed_loss, token_losses
from lm.training.optim import OptimizerConfig, learning_rate_factor, make_optimizer

if TYPE_CHECKING:
    from lm.data.tokenizer import StoryTokenizer

Batch = dict[str, Tensor]
Adapter = Literal["full", "lora", "peft"]


class TokenSums(Metric):
    """Sums over all tokens of a split, to compute loss, perplexity and bits per byte.

    Losses are summed as integers, in units of 2^-20 nats: the sums do not depend on the order, the batch size or the
    number of devices, and need no float64, which some devices lack.
    """

    UNIT = 2.0**-20
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss", "tokens", "text_loss", "bytes", "not_finite"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor, loss_mask: Tensor, text_mask: Tensor, num_bytes: Tensor) -> None:
        """Add a batch.

        Args:
            losses: (N,) float, cross-entropy of each target in nats.
            loss_mask: (N,) bool, whether a target counts; padding does not.
            text_mask: (N,) bool, whether it is text; bos, eos and padding are not.
            num_bytes: (N,) integers, UTF-8 bytes of each text target.
        """
        finite = torch.isfinite(losses)
        self.not_finite += (~finite & loss_mask).sum()
        units = (torch.where(finite, losses.float(), 0.0) / self.UNIT).round().to(torch.int64)
        self.loss += (units * loss_mask).sum()
        self.tokens += loss_mask.sum()
        self.text_loss += (units * text_mask).sum()
        self.bytes += (num_bytes * text_mask).sum()

    def compute(self) -> dict[str, float]:
        """``loss`` in nats per token, ``perplexity`` = exp(loss), ``bits_per_byte`` of the text.

        NaN if any token's loss is not finite: the integer sums cannot represent it.
        """
        if self.not_finite:
            return dict.fromkeys(("loss", "perplexity", "bits_per_byte"), math.nan)
        loss = self.UNIT * self.loss.item() / max(self.tokens.item(), 1)
        bits = self.UNIT * self.text_loss.item() / math.log(2)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits / max(self.bytes.item(), 1)}


class LanguageModel(StepModule):
    """Trains a decoder to continue stories."""

    def __init__(
        self,
        decoder: DecoderConfig = DecoderConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        generation: GenerationConfig = GenerationConfig(),
        variant: Variant = Variant(),
        compile: bool = False,
        activation_checkpointing: bool = False,
        init_from: str | None = None,
        adapter: Adapter = "full",
        lora: LoRAConfig = LoRAConfig(),
        adapter_weights: str | None = None,
    ) -> None:
        """
        Args:
            decoder: The model's shape; vocab_size comes from the tokenizer.
            optimizer: The optimizer and its schedule.
            generation: How ``predict`` decodes.
            variant: Changed parts of the decoder, for ablations; such a model cannot be exported.
            compile: Train with torch.compile, which takes some 20 s at the first step: on a GPU from batch to loss, for
                small models as CUDA graphs; on a CPU the blocks. Without a compiler, a note, and training uncompiled.
            activation_checkpointing: Keep only the inputs of the blocks and recompute the rest in the backward pass:
                less memory, about a third more time.
            init_from: Pretrained weights, with their shape and tokenizer: a run's folder, a checkpoint, a Hugging Face
                folder or hub name, a llama2.c .bin, a .gguf. The optimizer starts fresh.
            adapter: What trains: full (all weights), lora (low-rank updates), or peft (the same with PEFT).
            lora: The low-rank updates; target_modules uses PEFT's names for a Llama, such as q_proj.
            adapter_weights: Folder of a saved adapter, PEFT's or ours, to start from; it overrides all of lora except
                dropout.
        """
        super().__init__("loss")
        # Checkpoints hold plain values, so that they can be read without running code.
        decoder = DecoderConfig(**decoder) if isinstance(decoder, dict) else decoder
        optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        generation = GenerationConfig(**generation) if isinstance(generation, dict) else generation
        variant = Variant(**variant) if isinstance(variant, dict) else variant
        lora = LoRAConfig(**lora) if isinstance(lora, dict) else lora
        if variant.changed:
            from lm.model.variants import VariantDecoder

            if init_from is not None or adapter != "full":
                raise InputError(f"model.variant {variant.changed}: pretrained weights have no variant; leave it out")
            self.decoder: Decoder = VariantDecoder(decoder, variant)
        else:
            self.decoder = Decoder(decoder)
        if init_from is not None:
            from lm.formats.pretrained import load_weights

            load_weights(self.decoder, init_from)
        if adapter != "full":
            from lm.formats.adapters import adapt

            lora = adapt(self.decoder, adapter, lora, adapter_weights)
        elif adapter_weights is not None:
            raise InputError("model.adapter_weights needs model.adapter lora or peft, not full")
        self.adapter, self.lora = adapter, lora
        parts = {"decoder": decoder, "optimizer": optimizer, "generation": generation, "variant": variant}
        parts |= {} if adapter == "full" else {"lora": lora}
        self.save_hyperparameters({name: asdict(part) for name, part in parts.items()} | {"adapter": adapter})
        self.strict_loading = adapter == "full"  # else checkpoints hold only what trains
        self.optimizer_config = optimizer
        self.generation = generation
        self.decoder.recompute = activation_checkpointing
        self.compile_blocks = compile
        with torch.device("cpu"):  # even if the decoder is on the meta device
            self.sums = TokenSums()
            self.second_sums = TokenSums()  # of data.second_path
        self.tokenizer: StoryTokenizer | None = None  # of the data, for decoding
        self.on_token: Callable[[int, int], None] | None = None  # called with (row, token id) while generating

    @property
    def plain_decoder(self) -> Decoder:
        """The decoder for decoding; adapters are merged into a copy."""
        if self.adapter == "full":
            return self.decoder
        from lm.formats.adapters import merged

        return merged(self.decoder, self.lora)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All weights, or with an adapter those that train."""
        state = super().state_dict(*args, **kwargs)
        if self.adapter == "full":
            return state
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: weight for name, weight in state.items() if name in trained}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of token ids (B, T)."""
        return self.decoder(input_ids)

    def configure_model(self) -> None:
        """Shard the weights if the strategy requires it, as in configs/fsdp.yaml."""
        if self.device_mesh is not None and not isinstance(self.decoder, FSDPModule):
            from lm.training.fsdp import shard

            bfloat16 = self.trainer.precision == "bf16-mixed"
            shard(self.decoder, self.device_mesh["data_parallel"], bfloat16, self.trainer.strategy.root_device)

    def flops_per_token(self, length: int) -> int:
        """FLOPs to train on one token in a sequence of that length: six per weight, four per
        frozen weight, plus attention, including the masked half (arXiv:2204.02311, appendix B)."""
        config = self.decoder.config
        looked_up = None if config.tie_embeddings else self.decoder.embedding.weight
        multiplied = [weight for weight in self.decoder.parameters() if weight is not looked_up]
        products = sum((6 if weight.requires_grad else 4) * weight.numel() for weight in multiplied)
        return products + 12 * config.num_layers * config.hidden_size * length

    def setup(self, stage: str) -> None:
        self.tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)

    # training

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._summed_loss = partial(summed_loss, self.decoder)
        if self.compile_blocks and can_compile(self.device.type):
            # On a CPU, code for any batch shape, as a resumed run has, too; FSDP gathers weights between the blocks.
            if self.device.type == "cuda" and not isinstance(self.decoder, FSDPModule):
                from lm.training.compiled_loss import MOST_GRAPHED, CompiledLoss

                alone = self.trainer.accumulate_grad_batches == self.trainer.world_size == 1
                small = sum(weight.numel() for weight in self.decoder.parameters()) <= MOST_GRAPHED
                rows = getattr(self.trainer.datamodule, "batch_size", 0)
                self._summed_loss = CompiledLoss(self.decoder, use_graphs=alone and small, rows=rows)
            else:
                self.decoder.compile_blocks()
        elif self.compile_blocks:
            note = "note: model.compile does not work here (no g++, Python headers or Triton): training uncompiled"
            rank_zero_only(console.print)(note)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss over the tokens of a micro-batch."""
        names = ("tokens", "loss_mask", "positions")  # positions only with data.document_mask
        loss, tokens = self._summed_loss(*(batch[name] for name in names if name in batch))
        return self.step_loss(batch_idx, tokens, loss)

    def check_trainer(self, trainer: Trainer) -> None:
        """Check that the optimizer and its schedule suit the run.

        Raises:
            InputError: They do not.
        """
        config, divided = self.optimizer_config, isinstance(trainer.strategy, ModelParallelStrategy)
        if divided and self.adapter != "full":
            raise InputError(f"model.adapter {self.adapter}: this strategy shards the weights; use configs/ddp.yaml")
        if config.muon_learning_rate is not None and (divided or self.adapter != "full"):
            why = "Muon needs whole matrices, which this strategy shards across processes; use configs/ddp.yaml"
            why = f"{why}, or" if divided else f"model.adapter {self.adapter} trains no whole matrices;"
            raise InputError(f"model.optimizer.muon_learning_rate {config.muon_learning_rate}: {why} set it to null")
        if config.schedule != "constant" and trainer.max_steps == trainer.max_epochs == -1:
            raise InputError(
                f"model.optimizer.schedule {config.schedule} needs a last step to end at: give --trainer.max_steps, or "
                "use the schedule constant"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return make_optimizer(self, self.optimizer_config, fused=False).param_groups

    def configure_optimizers(self) -> dict[str, Any]:
        self.check_trainer(self.trainer)
        total_steps = self.trainer.estimated_stepping_batches
        # Under 16-mixed, gradients must be unscaled before clipping, which a fused optimizer does too late.
        fused = self.trainer.precision != "16-mixed"
        products = torch.bfloat16 if fast_bfloat16(self.device.type) else torch.float32
        compiled = self.compile_blocks and self.device.type == "cuda" and can_compile("cuda")
        optimizer = make_optimizer(self, self.optimizer_config, fused, products, compiled)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, total_steps, self.optimizer_config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # evaluation

    def on_validation_epoch_start(self) -> None:
        self.sums.reset()
        self.second_sums.reset()

    on_test_epoch_start = on_validation_epoch_start

    def _evaluate(self, batch: Batch, sums: TokenSums) -> None:
        tokens = batch["tokens"].long()
        hidden, targets = self.decoder.hidden_states(tokens[:, :-1]), tokens[:, 1:].flatten()
        if has_plain_head(self.decoder):
            losses = token_losses(hidden.flatten(0, 1), self.decoder.head_weight, targets)
        else:
            losses = F.cross_entropy(self.decoder.logits(hidden).flatten(0, 1).float(), targets, reduction="none")
        sums.update(losses, *(batch[name].flatten() for name in ("loss_mask", "text_mask", "bytes")))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, self.second_sums if dataloader_idx else self.sums)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.sums)

    def on_validation_epoch_end(self) -> None:
        self.log_sums("val/", self.sums)
        if isinstance(self.trainer.val_dataloaders, list):  # data.second_path
            self.log_sums("val/second_", self.second_sums)

    def on_test_epoch_end(self) -> None:
        self.log_sums("test/", self.sums)

    def log_sums(self, prefix: str, sums: TokenSums) -> None:
        for name, value in sums.compute().items():
            self.log(f"{prefix}{name}", value, prog_bar=f"{prefix}{name}" in ("val/loss", "val/perplexity"))

    # decoding

    def on_predict_start(self) -> None:
        self._decoding = self.plain_decoder

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Continue each prompt of the batch: dicts of ``prompt``, ``text``, ``tokens`` and ``finish_reason``."""
        from lm.training.predictions import continue_prompts

        # In the weights' precision: in bfloat16 a story would depend on the rest of its batch.
        with torch.autocast(self.device.type, enabled=False):
            return continue_prompts(self._decoding, batch, self.generation, self.tokenizer, self.on_token)
