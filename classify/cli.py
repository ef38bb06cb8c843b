"""The classifier's command line: what `tinylab classify` runs."""

from collections.abc import Sequence

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from classify.callbacks import AdapterExport, Evaluation, PredictionWriter
from classify.data import TextClassificationDataModule
from classify.module import ReviewClassifier
from classify.pretrained import longest_input
from experiment.commands.cli import ExperimentCLI
from experiment.errors import InputError
from experiment.runs.run import CONFIG, recorded


class ClassifyCLI(ExperimentCLI):
    """The classifier's command line: uses the model's tokenizer and the data's classes."""

    package = "classify"
    parts = (("data", TextClassificationDataModule, {}),)

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(ReviewClassifier, TextClassificationDataModule, [Evaluation(), AdapterExport()], args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.link_arguments("data.label_names", "model.label_names", apply_on="instantiate")

    def adjust(self, config: Namespace) -> None:
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.name
        if config.data.order_seed is None:
            config.data.order_seed = int(config.seed_everything)
        if self.subcommand == "predict" and config.data.texts is not None and config.data.label_names is None:
            # The checkpoint knows the classes: no training data is needed to classify texts.
            config.data.label_names = self.stored().get("hyper_parameters", {}).get("label_names")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except InputError as error:
            # The run may have been trained on data given by flags, which the current configuration lacks.
            path = recorded(self.run_dir, "data.path")
            if self.subcommand == "fit" or path in (None, self.config[self.subcommand].data.path):
                raise
            own = self.run_dir / CONFIG
            other = ", or name texts with --data.texts" if self.subcommand == "predict" else ""
            raise InputError(f"{error}; this run was trained on {path}: for that use --config {own}{other}") from error
        self._check_data_fits_model()

    def next_command(self, kept: str) -> str:
        return f"""{super().next_command(kept)} --data.texts '["The acting was far from convincing."]'"""

    def _check_data_fits_model(self) -> None:
        data, model, longest = self.datamodule, self.model.model, longest_input(self.model.model)
        for option in ("max_length", "eval_max_length"):
            if longest is not None and (value := getattr(data, option)) > longest:
                raise InputError(f"data.{option} {value} exceeds the {longest} positions of the model")
        if len(data.tokenizer) > model.config.vocab_size:
            raise InputError(
                f"data.tokenizer {data.tokenizer_name!r} has {len(data.tokenizer)} tokens, the model "
                f"{self.model.hparams.name!r} {model.config.vocab_size}: use the model's own (null)"
            )


CLI = ClassifyCLI  # the name by which comparisons find a package's command line
