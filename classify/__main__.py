"""`python -m classify fit | validate | test | predict`: train and use the sentiment classifier."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from classify.callbacks import AdapterExport, PredictionWriter
from classify.data import IMDB
from classify.module import ReviewClassifier
from experiment.cli import ExperimentCLI, run
from experiment.run import read_checkpoint


class ClassifyCLI(ExperimentCLI):
    example = """--data.texts '["I loved it."]'"""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__("classify", ReviewClassifier, IMDB, [AdapterExport()], args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.link_arguments("data.label_names", "model.label_names", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.name
        if config.data.order_seed is None and isinstance(config.seed_everything, int):
            config.data.order_seed = int(config.seed_everything)
        if self.subcommand == "predict" and config.data.texts is not None and config.data.label_names is None:
            # The checkpoint knows the classes: no training data is needed to classify texts.
            hyperparameters = read_checkpoint(self.checkpoint).get("hyper_parameters", {}) if self.checkpoint else {}
            config.data.label_names = hyperparameters.get("label_names")


def main(args: Sequence[str] | None = None) -> ClassifyCLI:
    """Run the command line; `args` stands in for that of the process."""
    return run(ClassifyCLI, args)


if __name__ == "__main__":
    main()
