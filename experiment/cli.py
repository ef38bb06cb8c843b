"""The command line of both experiments: LightningCLI, with a folder for each run and errors that can be read."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from experiment.checkpoints import BestCheckpoint, ExactResume, StepCheckpoint
from experiment.errors import InputError
from experiment.hardware import default_precision
from experiment.metrics_file import MetricsFile
from experiment.progress import RunProgressBar, console, validation_results
from experiment.quiet import quiet_libraries
from experiment.run import CONFIG, check_fits, resolve_checkpoint, resolve_run_dir


class ExperimentCLI(LightningCLI):
    """LightningCLI with ``--run_dir``, checkpoints, a metrics file and the precision that is fast here.

    A value given by hand wins over a config file, and a config file over what a checkpoint stores; a checkpoint
    that does not fit is refused before anything runs.

    Args:
        package: Name of the experiment: its part of the default run folder.
        module: The LightningModule.
        data: The LightningDataModule.
        callbacks: Callbacks that are always there and have nothing to configure.
        args: Command line arguments, by default those of the process.
    """

    def __init__(
        self,
        package: str,
        module: type[LightningModule],
        data: type[LightningDataModule],
        callbacks: Sequence[Callback],
        args: Sequence[str] | None,
    ) -> None:
        self.package = package
        self.callbacks = callbacks
        # Errors are printed by ``run``, on one line.
        options = {"exit_on_error": False, "default_env": True}
        super().__init__(
            module,
            data,
            args=None if args is None else list(args),
            save_config_callback=None,
            seed_everything_default=42,
            trainer_defaults={
                "enable_model_summary": False,
                # Our batch schedules share the data among processes, without counting a sample twice.
                "use_distributed_sampler": False,
            },
            parser_kwargs={
                **options,
                "env_prefix": "TINYLAB",
                **{name: {**options, "env_prefix": f"TINYLAB_{name.upper()}"} for name in self.subcommands()},
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run. By default runs/<package>/<name of the config>, with -2, -3 … where taken.",
        )
        parser.add_argument("--debug", action="store_true", help="Show tracebacks and the libraries' own messages.")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """As Lightning's, without its warning where a caller gives the arguments: the tests and tables do."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the hyperparameters of a checkpoint override flags; here the user wins."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        configs = [Path(str(path)) for path in config.get("config") or []]
        self.run_dir = resolve_run_dir(self.package, self.subcommand, config.run_dir, configs, config.ckpt_path)
        self.checkpoint = resolve_checkpoint(self.subcommand, self.run_dir, config.ckpt_path)
        if config.trainer.precision is None:
            config.trainer.precision = default_precision(config.trainer.accelerator)
        config.trainer.default_root_dir = str(self.run_dir)
        for logger in _as_list(config.trainer.logger):
            if _is_wandb(logger):
                _fill_in_wandb(logger.init_args, self.run_dir, self.package)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a configuration that a dataclass or a constructor refuses
            raise InputError(str(error)) from error
        self.config_init[self.subcommand].ckpt_path = self.checkpoint and str(self.checkpoint)
        if self.checkpoint is not None:
            check_fits(self.model, self.checkpoint)
        elif self.subcommand != "fit":
            console.print("note: no --ckpt_path was given, so the model has its initial weights")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        loggers = [logger for logger in _as_list(config.logger) if isinstance(logger, Logger)]
        training = self.subcommand == "fit"
        callbacks = [*_as_list(config.callbacks), *self.callbacks, ExactResume()]
        if config.enable_progress_bar is not False:
            callbacks.append(RunProgressBar())
        metrics = MetricsFile(self.run_dir)
        trainer = super().instantiate_trainer(
            logger=[metrics, *loggers] if training else False, callbacks=callbacks, **kwargs
        )
        metrics.trainer = trainer
        return trainer

    def before_fit(self) -> None:
        self._save_config()
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(_step_of(self.checkpoint))
        if self.checkpoint is not None:
            console.print(f"resuming from {self.checkpoint}")

    @rank_zero_only
    def _save_config(self) -> None:
        """Write config.yaml: everything that was really used, except for what belongs to this one call."""
        try:
            (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            text = self._parser("fit").dump(self.config["fit"], skip_none=False)
            config = yaml.safe_load(text)
            for name in ("config", "run_dir", "ckpt_path", "weights_only", "debug"):
                config.pop(name, None)
            config["trainer"]["default_root_dir"] = None
            partial = self.run_dir / f"{CONFIG}.partial"
            partial.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            partial.replace(self.run_dir / CONFIG)
        except OSError as error:
            raise InputError(
                f"run_dir {self.run_dir} cannot be written ({error.strerror}): choose another with --run_dir"
            ) from error

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        console.print(f"\nfinished after {self.trainer.global_step:,} steps; everything lies in {self.run_dir}")
        for name, value in validation_results(self.trainer).items():
            console.print(f"  {name:<20} {value:.4f}")
        kept = "best" if (self.run_dir / "checkpoints" / "best.ckpt").exists() else "last"
        console.print(f"next: python -m {self.package} predict --config {self.run_dir / CONFIG} --ckpt_path {kept}")


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_wandb(logger: Any) -> bool:
    return isinstance(logger, jsonargparse.Namespace) and logger.get("class_path", "").endswith(WandbLogger.__name__)


def _fill_in_wandb(options: jsonargparse.Namespace, run_dir: Path, package: str) -> None:
    """Keep the W&B files in the run's folder, and stay offline unless the user is logged in or says otherwise."""
    if options.get("save_dir") in (None, "."):
        options.save_dir = str(run_dir)
    if options.get("name") is None:
        options.name = f"{package}/{run_dir.name}"
    netrc = Path.home() / ".netrc"
    logged_in = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
    if "WANDB_MODE" not in os.environ and not logged_in:
        options.offline = True
    (run_dir / "wandb").mkdir(parents=True, exist_ok=True)  # else wandb falls back to a temporary folder


def _step_of(checkpoint: Path | None) -> int:
    from experiment.run import read_checkpoint

    return 0 if checkpoint is None else int(read_checkpoint(checkpoint)["global_step"])


def run(cli: type[ExperimentCLI], args: Sequence[str] | None = None) -> ExperimentCLI:
    """Run an experiment's command line.

    Bad input ends with one line on stderr and exit code 2; ``--debug`` shows the traceback as well. Every other
    exception is a bug and passes.

    Args:
        cli: The experiment's own subclass of ExperimentCLI, which takes ``args`` alone.
        args: Command line arguments, by default those of the process.
    """
    given = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in given
    quiet_libraries(debug)
    try:
        return cli(args)
    except (InputError, jsonargparse.ArgumentError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
