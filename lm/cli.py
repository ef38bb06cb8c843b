"""The language model's command line: what ``tinylab lm`` runs."""

import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from experiment.commands.cli import ExperimentCLI
from experiment.errors import InputError
from experiment.invocation import command
from experiment.nn.lora_config import LoRAConfig
from experiment.runs.run import recorded, run_of
from experiment.runs.throughput import Throughput
from lm.data.module import TextDataModule
from lm.model.config import DecoderConfig, GenerationConfig, Variant
from lm.training.callbacks import FirstValidation, Samples
from lm.training.module import LanguageModel
from lm.training.optim import OptimizerConfig


class LanguageCLI(ExperimentCLI):
    """The language model's command line: the decoder gets its vocabulary size from the data."""

    package = "lm"
    shown_as_written = True
    parts = (
        ("data", TextDataModule, {}),
        ("model.decoder", DecoderConfig, {"vocab_size": 1}),
        ("model.optimizer", OptimizerConfig, {}),
        ("model.generation", GenerationConfig, {}),
        ("model.lora", LoRAConfig, {}),
    )

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.first_validation = FirstValidation()
        super().__init__(LanguageModel, TextDataModule, [Throughput(), self.first_validation], args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_argument(
            "--predictions.stream",
            type=bool,
            default=True,
            help="On a terminal, show the first story of each batch as it is generated, token by token.",
        )
        parser.add_argument(
            "--validate_first",
            type=bool | None,
            default=None,
            help="Validate before the first step of fit. By default only with model.init_from.",
        )
        parser.set_defaults({"model.decoder.max_sequence_length": None})  # which then follows data.sequence_length
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.num_tokens", "model.decoder.vocab_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        config.data.seed = int(config.seed_everything)  # the seed that was drawn if it was true

    def complete(self, config: Namespace) -> None:
        """Use the shape of existing weights, and the tokenizer of the weights that training starts from."""
        model, init_from = config.model, config.model.init_from
        wanted = config.validate_first
        self.first_validation.wanted = init_from is not None if wanted is None else wanted
        if init_from is not None or model.adapter != "full":
            from lm.formats.pretrained import take_shape

            if init_from is None and self._base is None:
                raise InputError(f"model.adapter {model.adapter}: no weights to adapt; give --model.init_from")
            take_shape(config, self.flags, self.stored("weights"))
        if model.decoder.max_sequence_length is None:
            before = self.stored().get("hyper_parameters", {}).get("decoder", {})
            model.decoder.max_sequence_length = before.get("max_sequence_length", config.data.sequence_length)

    def adjust(self, config: Namespace) -> None:
        """Use the tokenizer and base weights saved in the checkpoint's run, since their source may be gone. A
        tokenizer given as a flag takes precedence."""
        if self.checkpoint is None:
            return
        if (own := run_of(self.checkpoint) / "tokenizer").is_dir():
            data, before = config.data, recorded(own.parent, "data") or {}
            trained = data.tokenizer == "train" and data.vocab_size == before.get("vocab_size", data.vocab_size)
            if trained or data.tokenizer == before.get("tokenizer") != "train":
                data.tokenizer = str(own)
        model = config.model
        if model.init_from is not None or model.adapter != "full":
            model.adapter_weights = None
            if model.adapter == "full":
                model.init_from = None
            elif self._base is not None:
                model.init_from = str(self._base)

    @property
    def _base(self) -> Path | None:
        """The base weights of the checkpoint's run, if it has a copy."""
        from lm.formats.pretrained import BASE

        file = None if self.checkpoint is None else self.checkpoint.parent / BASE
        return file if file is not None and file.is_file() else None

    def before_fit(self) -> None:
        self._check_state()
        super().before_fit()
        rank_zero_only(self.datamodule.tokenizer.save)(self.run_dir / "tokenizer")
        if self.model.adapter != "full":
            from lm.formats.pretrained import save_base

            rank_zero_only(save_base)(self.model.decoder, self.run_dir / "checkpoints")

    def weights_device(self) -> AbstractContextManager:
        """The meta device if FSDP will shard the weights, since no process may have room for all of them."""
        config = self.config[self.subcommand]
        strategy = getattr(config.trainer.strategy, "class_path", "")
        divided = (
            self.subcommand != "predict"
            and config.model.init_from is None
            and strategy.endswith("FullyShardedStrategy")
        )
        plain = not Variant(**config.model.variant.as_dict()).changed  # variants draw some weights themselves
        return torch.device("meta") if divided and plain else nullcontext()

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        length, context = self.datamodule.sequence_length, self.model.decoder.config.max_sequence_length
        if length > context:
            raise InputError(
                f"data.sequence_length {length} is longer than model.decoder.max_sequence_length {context}: "
                "make the first smaller or the second larger"
            )
        if self.subcommand == "fit":
            init_from = self.config[self.subcommand].model.init_from
            if self.checkpoint is None and init_from is None:  # a new model is trained with bos first
                self.datamodule.tokenizer.begin_with_bos()
            self.config_init[self.subcommand].samples.check(self.datamodule.tokenizer, context)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand == "predict":
            from lm.training.predictions import Predictions

            self.callbacks = [*self.callbacks, Predictions(self.config[self.subcommand].predictions.stream)]
        return super().instantiate_trainer(**kwargs)

    def next_command(self, kept: str) -> str:
        from lm.data.prompts import flags_to_try

        flags = flags_to_try(self.datamodule.corpus("validation"), self.datamodule.tokenizer)
        chat = f"{command('tell')} {shlex.quote(str(self.run_dir))}"
        return chat if flags is None else f"{super().next_command(kept)} {flags}"

    def _check_state(self) -> None:
        """Raise an InputError if a checkpoint has the state of another optimizer."""
        stored = self.stored()
        if not stored.get("optimizer_states"):  # an imported model has none
            return
        before = stored.get("hyper_parameters", {}).get("optimizer", {}).get("muon_learning_rate")
        now = self.model.optimizer_config.muon_learning_rate
        if (before is None) != (now is None):
            raise InputError(
                f"model.optimizer.muon_learning_rate {'null' if now is None else now}: {self.checkpoint} was trained "
                f"{'without' if before is None else 'with'} Muon, and a resumed run cannot change its optimizer; give "
                f"{'null' if before is None else before}, or start a new run"
            )


CLI = LanguageCLI  # the name by which comparisons find a package's command line
