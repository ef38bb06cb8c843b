"""The language model's command line: what ``python -m lm`` runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from experiment.cli import ExperimentCLI
from experiment.errors import InputError
from experiment.run import read_checkpoint, recorded, run_of
from experiment.sharding import FullyShardedStrategy
from experiment.throughput import Throughput
from lm.callbacks import Perplexity, Predictions, Samples
from lm.data import TinyStories
from lm.generation import GenerationConfig
from lm.model import DecoderConfig
from lm.module import LanguageModel
from lm.optim import OptimizerConfig
from lm.variants import Variant


class LanguageCLI(ExperimentCLI):
    """The language model's command line: its data's vocabulary becomes the decoder's."""

    example = """--data.prompts '["Once upon a time"]'"""
    shown_as_written = True
    parts = (
        ("data", TinyStories, {}),
        ("model.decoder", DecoderConfig, {"vocab_size": 1}),
        ("model.optimizer", OptimizerConfig, {}),
        ("model.generation", GenerationConfig, {}),
    )

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__("lm", LanguageModel, TinyStories, [Perplexity(), Throughput()], args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(Predictions, "predictions")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.num_tokens", "model.decoder.vocab_size", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        # A run keeps its tokenizer, so that its model can be used where that one's source is not. Another one that is
        # given by hand wins.
        if self.checkpoint is not None and (own := run_of(self.checkpoint) / "tokenizer").is_dir():
            data, before = self.config[self.subcommand].data, recorded(own.parent, "data") or {}
            trained = data.tokenizer == "train" and data.vocab_size == before.get("vocab_size", data.vocab_size)
            if trained or data.tokenizer == before.get("tokenizer") != "train":
                self.set_for_this_call("data.tokenizer", str(own))

    def _set_seed(self) -> None:
        super()._set_seed()
        config = self.config[self.subcommand]
        config.data.seed = int(config.seed_everything)  # the one that was drawn, where it was true

    def before_fit(self) -> None:
        self.model.check_trainer(self.trainer)
        self._check_state()
        super().before_fit()
        rank_zero_only(self.datamodule.tokenizer.save)(self.run_dir / "tokenizer")

    def weights_device(self) -> AbstractContextManager:
        """No device yet, where the weights will be divided among processes, none of which may have room for all."""
        config = self.config[self.subcommand]
        strategy = getattr(config.trainer.strategy, "class_path", "")
        divided = self.subcommand != "predict" and strategy.endswith(FullyShardedStrategy.__name__)
        plain = not Variant(**config.model.variant.as_dict()).changed  # others draw some of their weights themselves
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
            if self.checkpoint is None:  # a model that learns from nothing learns that stories begin with bos
                self.datamodule.tokenizer.begin_with_bos()
            self._get(self.config_init, "samples").check(self.datamodule.tokenizer, context)

    def _check_state(self) -> None:
        """See that a checkpoint holds the state of the optimizer that shall go on from it."""
        stored = {} if self.checkpoint is None else read_checkpoint(self.checkpoint, part="outline")
        if not stored.get("optimizer_states"):  # an imported model has none
            return
        before = stored.get("hyper_parameters", {}).get("optimizer", {}).get("muon_learning_rate")
        now = self.model.optimizer_config.muon_learning_rate
        if (before is None) != (now is None):
            raise InputError(
                f"model.optimizer.muon_learning_rate {'null' if now is None else now}: {self.checkpoint} was trained "
                f"{'without' if before is None else 'with'} Muon, and its optimizer cannot go on as another; give "
                f"{'null' if before is None else before}, or train anew"
            )


CLI = LanguageCLI  # by this name, comparisons find the command line of a package
