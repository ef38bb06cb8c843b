"""The classifier under Lightning: one module for both adapters, full fine-tuning, and a head on a frozen encoder."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from classify.attention import has_fast_attention
from classify.dropout import use_fast_dropout
from classify.pretrained import load_classifier
from experiment.console import console
from experiment.errors import InputError
from experiment.nn.adapter_files import PEFT_PREFIX, adapter_state_dict, load_adapter, write_adapter
from experiment.nn.hardware import can_compile
from experiment.nn.lora_config import LoRAConfig
from experiment.nn.lora_models import count_parameters, fingerprint, inject_lora, saved_whole, target_names, train_only
from experiment.runs.step_sums import StepModule

Adapter = Literal["custom", "peft", "full", "head"]


class ReviewClassifier(StepModule):
    """A pretrained BERT that sorts reviews into classes, adapted in one of four ways.

    Its checkpoints hold only what the base model's files lack: the trained weights and the new head.
    """

    def __init__(
        self,
        name: str = "bert-base-uncased",
        label_names: list[str] | None = None,
        adapter: Adapter = "custom",
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.05,
        target_modules: list[str] | str = ["query", "key", "value"],  # noqa: B006 (shown by --help; never changed)
        modules_to_save: list[str] = ["classifier"],  # noqa: B006
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool = True,
        adapter_weights: str | None = None,
        learning_rate: float = 1e-3,
        loraplus_lr_ratio: float = 1.0,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        hidden_dropout: float | None = None,
        attention_dropout: float | None = None,
        ignore_padding: bool = True,
        dropout_active: bool = True,
        compile: bool = False,
    ) -> None:
        """
        Args:
            name: The pretrained model: a hub name, a local folder, or package:<package>/<folder>.
            label_names: Names of the classes; the command line takes them from the data.
            adapter: custom (our own LoRA), peft (PEFT's LoRA), full (all weights train), or head
                (the encoder stays frozen and only modules_to_save train).
            r: Rank of the LoRA update.
            lora_alpha: The update is scaled by lora_alpha / r.
            lora_dropout: Dropout on the adapter's input.
            target_modules: Linear layers to adapt: suffixes of their names, or one regular expression.
            modules_to_save: Modules trained in full besides the adapter, by name suffix; add pooler to train
                BERT's pooler too.
            use_rslora: Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023).
            use_dora: Train direction and magnitude separately (Liu et al. 2024).
            init_lora_weights: Start at the pretrained model (B = 0); false starts from a random B.
            adapter_weights: Folder of a saved adapter, PEFT's or ours, to start from.
            learning_rate: AdamW's peak learning rate, at the end of the warm-up.
            loraplus_lr_ratio: B's rate is this multiple of A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354), and so is
                that of biases, as in PEFT; 1 is plain LoRA, 16 is the paper's choice. Lower the learning rate with it.
            weight_decay: Weight decay of AdamW; biases and norms never decay.
            warmup: Fraction of all steps in which the rate rises from 0; it then falls linearly to 0.
            hidden_dropout: Dropout after embeddings and layers; null keeps the model's own.
            attention_dropout: Dropout on attention weights; null keeps the model's own, 0 keeps the fast kernel.
            ignore_padding: Mask padded positions. False is deliberately wrong, for the ablation only.
            dropout_active: Train with the model's dropout. False is deliberately wrong, for the ablation only: what
                Lightning does with a transformers model by default.
            compile: Train with torch.compile, which takes a minute at the first step; prints a note and trains
                uncompiled if there is no compiler.
        """
        super().__init__("loss", "accuracy")
        label_names = label_names or ["negative", "positive"]
        self.save_hyperparameters({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        self.strict_loading = False
        if not 0 <= warmup < 1:
            raise InputError(f"model.warmup is {warmup}: expected a share of the steps, in [0, 1)")
        for option, value in (("hidden_dropout", hidden_dropout), ("attention_dropout", attention_dropout)):
            if value is not None and not 0 <= value < 1:
                raise InputError(f"model.{option} is {value}: expected a probability in [0, 1), or null")
        if not learning_rate > 0:
            raise InputError(f"model.learning_rate is {learning_rate}: expected a number above 0, such as 1e-3")
        if not loraplus_lr_ratio > 0:
            raise InputError(f"model.loraplus_lr_ratio is {loraplus_lr_ratio}: expected a number above 0, such as 16")
        if loraplus_lr_ratio != 1 and adapter not in ("custom", "peft"):
            raise InputError(f"model.loraplus_lr_ratio needs adapter custom or peft, not {adapter}, which has no B")
        model, new = load_classifier(name, label_names, hidden_dropout, attention_dropout)
        new_parameters = {id(parameter) for key, parameter in model.named_parameters() if key in new}
        encoder = list(model.named_parameters())
        try:
            self._random_frozen = self._find_random_frozen(model, new)
            self.model: nn.Module = self._adapted(model)
        except ValueError as error:
            raise InputError(f"model: {error}") from error
        use_fast_dropout(self.model)
        self.base_fingerprint = fingerprint(
            (key, p) for key, p in encoder if not p.requires_grad and id(p) not in new_parameters
        )
        kept = {id(p) for p in self.parameters() if p.requires_grad} | new_parameters
        self._kept = {key for key, parameter in self.named_parameters() if id(parameter) in kept}
        if adapter_weights is not None:
            self._load_adapter(adapter_weights)

        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(len(label_names), average="micro", ignore_index=-1, validate_args=False),
                "f1": MulticlassF1Score(len(label_names), average="macro", ignore_index=-1, validate_args=False),
            }
        )
        self.losses = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        self.metrics = nn.ModuleDict({split: metrics.clone(prefix=f"{split}/") for split in ("val", "test")})

    @property
    def lora_config(self) -> LoRAConfig:
        h = self.hparams
        return LoRAConfig(
            h.r, h.lora_alpha, h.lora_dropout, h.target_modules, h.modules_to_save,
            h.use_rslora, h.use_dora, h.init_lora_weights,
        )  # fmt: skip

    def _adapted(self, model: nn.Module) -> nn.Module:
        if self.hparams.adapter == "custom":
            inject_lora(model, self.lora_config)
        elif self.hparams.adapter == "peft":
            return peft_model(model, self.lora_config)
        elif self.hparams.adapter == "head":
            train_only(model, self.hparams.modules_to_save)
        return model

    def _find_random_frozen(self, model: nn.Module, new: set[str]) -> list[str]:
        """Modules that the base model's files lack and that are not trained, such as the pooler of a BERT
        saved without one: an exported adapter includes them, else every load would draw new random ones."""
        if self.hparams.adapter not in ("custom", "peft"):
            return []
        whole = saved_whole(model, self.hparams.modules_to_save)
        random = {key.rpartition(".")[0] for key in new} - whole
        if clash := sorted(random & set(target_names(model, self.hparams.target_modules))):
            raise ValueError(
                f"target_modules adapts {clash[0]}, whose weights {self.hparams.name!r} lacks, so they are random "
                "numbers: train it in full, with modules_to_save"
            )
        return sorted(random)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, classes), float32, of input_ids (B, T) under attention_mask (B, T); None attends to all."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()

    def logits(
        self, batch: dict[str, Tensor], forward: Callable[[Tensor, Tensor | None], Tensor] | None = None
    ) -> Tensor:
        """Logits (B, classes), float32, of a batch of the data module, made by `forward` or code compiled from it."""
        input_ids, mask = batch["input_ids"].long(), None
        if self.hparams.ignore_padding and "lengths" in batch:
            mask = torch.arange(input_ids.shape[1], device=self.device) < batch["lengths"][:, None]
            # For a 2-D mask, transformers would synchronize to check whether it is needed; a 4-D one goes straight to
            # our attention.
            mask = mask[:, None, None] if has_fast_attention(self.model) else mask.long()
        return (forward or self)(input_ids, mask)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._trained_forward = None
        if self.hparams.compile and can_compile(self.device.type):
            # Dynamic width from the first step on, so that a resumed run uses the same code.
            self._trained_forward = torch.compile(self.forward, dynamic=True)
        elif self.hparams.compile:
            note = "note: model.compile does not work here (no g++, Python headers or Triton): training uncompiled"
            rank_zero_only(console.print)(note)
        # from_pretrained returns the model in eval mode and Lightning leaves it there (pytorch-lightning#20105).
        self.model.train(self.hparams.dropout_active)
        if not self.hparams.dropout_active:  # Lightning would warn about what was requested
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        logits = self.logits(batch, self._trained_forward)
        labels = batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(dim=1) == labels).sum()
        return self.step_loss(batch_index, loss.new_full((), len(labels)), loss, correct)

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        """The same as `predict_step`, for callbacks that show predictions."""
        return _verdicts(batch, self._evaluate(batch, "val"))

    def test_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], split: str) -> Tensor:
        """Logits (B, classes). Each review counts once, whatever the batches: the means are over the whole split."""
        logits, labels = self.logits(batch), batch["labels"]
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
        self.losses[split].update(losses, weight=(labels >= 0).float())
        self.metrics[split].update(logits, labels)
        self.log(f"{split}/loss", self.losses[split], on_epoch=True, prog_bar=True)
        self.log_dict(self.metrics[split], on_epoch=True, prog_bar=True)
        return logits

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        """Class probabilities (B, classes), with the texts' positions and labels (B,)."""
        return _verdicts(batch, self.logits(batch))

    def check_trainer(self, trainer: Trainer) -> None:
        """Check that the schedule has a last step.

        Raises:
            InputError: It has none.
        """
        if trainer.max_steps == trainer.max_epochs == -1:
            raise InputError(
                "trainer.max_epochs -1: the learning rate falls to 0 at the last step; give --trainer.max_steps"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups: biases, norms and DoRA's magnitudes do not decay. With LoRA+, B and vectors use a multiple
        of the learning rate, as in PEFT."""
        rate, decay = self.hparams.learning_rate, self.hparams.weight_decay
        faster = rate * self.hparams.loraplus_lr_ratio
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        vectors = [p for _, p in trained if p.ndim <= 1]
        b = [p for name, p in trained if p.ndim > 1 and "lora_B" in name]
        others = [p for name, p in trained if p.ndim > 1 and "lora_B" not in name]
        groups = ((others, rate, decay), (b, faster, decay), (vectors, faster, 0.0))
        return [{"params": some, "lr": own, "weight_decay": decayed} for some, own, decayed in groups if some]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW whose rate rises, then falls, linearly. (transformers' schedule starts at 0: its first step learns
        nothing.)"""
        optimizer = torch.optim.AdamW(self.parameter_groups(), fused=self.trainer.precision != "16-mixed")
        steps = int(self.trainer.estimated_stepping_batches)
        rising = round(self.hparams.warmup * steps)

        def rate(step: int) -> float:
            return (step + 1) / (rising + 1) if step < rising else (steps - step) / max(1, steps - rising)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # checkpoints

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if key in self._kept}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["base_fingerprint"] = self.base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_base(checkpoint.get("base_fingerprint"), "the checkpoint")
        if lost := sorted(self._kept - checkpoint["state_dict"].keys()):
            raise InputError(f"the checkpoint lacks {lost[0]} and {len(lost) - 1} more: it belongs to another adapter")

    def _check_base(self, stored: str | None, what: str) -> None:
        if stored is not None and stored != self.base_fingerprint:
            raise InputError(
                f"{what} was trained on a base model other than {self.hparams.name!r}: give the original model.name"
            )

    # adapters as files

    def save_adapter(self, folder: str) -> None:
        """Write the adapter, custom or peft, in PEFT's format."""
        config = replace(self.lora_config, modules_to_save=[*self.hparams.modules_to_save, *self._random_frozen])
        if self.hparams.adapter == "peft":
            import peft

            base = self.model.get_base_model()
            weights = peft.get_peft_model_state_dict(self.model)
            weights |= {
                f"{PEFT_PREFIX}{name}.{key}": value
                for name in self._random_frozen
                for key, value in base.get_submodule(name).state_dict().items()
            }
        else:
            weights = adapter_state_dict(self.model, config.modules_to_save)
        path = self.model.config.name_or_path
        write_adapter(weights, config, folder, path, {"base_fingerprint": self.base_fingerprint})

    def _load_adapter(self, folder: str) -> None:
        if self.hparams.adapter not in ("custom", "peft"):
            raise InputError(f"model.adapter_weights needs adapter custom or peft, not {self.hparams.adapter}")
        # PEFT's wrappers change the module tree, so PEFT loads the weights, after the same checks on
        # a plain model.
        try:
            if self.hparams.adapter == "custom":
                metadata = load_adapter(self.model, folder)
            else:
                plain, _ = load_classifier(self.hparams.name, self.hparams.label_names)
                inject_lora(plain, self.lora_config)
                metadata = load_adapter(plain, folder)
                self.model.load_adapter(folder, "default", is_trainable=True)
        except ValueError as error:
            raise InputError(f"model.adapter_weights: {error}") from error
        self._check_base(metadata.get("base_fingerprint"), f"model.adapter_weights {folder}")

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return count_parameters(self.model)


def _verdicts(batch: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    return {"probabilities": logits.softmax(dim=1), "index": batch["index"], "labels": batch["labels"]}


def peft_model(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """The same adaptation with PEFT."""
    import peft

    if "classifier" not in config.modules_to_save:
        raise ValueError("modules_to_save lacks classifier, which PEFT always trains: use adapter custom to freeze it")
    target_names(model, config.target_modules)  # PEFT ignores a target that matches nothing if another one matches
    options = {name: getattr(config, name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    options |= {name: getattr(config, name) for name in ("use_rslora", "use_dora", "init_lora_weights")}
    others = [name for name in config.modules_to_save if name != "classifier"]
    with warnings.catch_warnings():
        # peft 0.21 uses a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return peft.get_peft_model(
            model, peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=others or None, **options)
        )
