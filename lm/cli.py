"""The language model's command line: what ``python -m lm`` runs."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from experiment.cli import ExperimentCLI
from experiment.errors import InputError
from experiment.run import read_checkpoint
from lm.callbacks import Perplexity, Predictions, Samples, Throughput
from lm.data import TinyStories
from lm.generation import GenerationConfig
from lm.model import DecoderConfig
from lm.module import LanguageModel
from lm.optim import OptimizerConfig


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
        # A trained tokenizer lies in the run's folder, so that its model can be used where the corpus is not.
        data, own = self.config[self.subcommand].data, self.run_dir / "tokenizer"
        self.trains_tokenizer = data.tokenizer == "train"
        if self.checkpoint is not None and self.trains_tokenizer and own.is_dir():
            data.tokenizer = str(own)

    def before_fit(self) -> None:
        self.model.check_trainer(self.trainer)
        self._check_state()
        super().before_fit()
        rank_zero_only(self.datamodule.tokenizer.save)(self.run_dir / "tokenizer")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        if self.trains_tokenizer:
            self.config[self.subcommand].data.tokenizer = "train"  # as config.yaml shall have it
        length, context = self.datamodule.sequence_length, self.model.decoder.config.max_sequence_length
        if length > context:
            raise InputError(
                f"data.sequence_length {length} is longer than model.decoder.max_sequence_length {context}: "
                "make the first smaller or the second larger"
            )
        if self.subcommand == "fit":
            self._get(self.config_init, "samples").check(self.datamodule.tokenizer, context)

    def _check_state(self) -> None:
        """See that a checkpoint holds the state of the optimizer that shall go on from it."""
        stored = {} if self.checkpoint is None else read_checkpoint(self.checkpoint)
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
