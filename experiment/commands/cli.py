"""The command line of both experiments: LightningCLI, with a folder for each run and readable errors."""

import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiment.commands.parser import ExperimentParser, configs_first
from experiment.compat.lightning import keep_buffers_local, leave_sigterm_alone, validate_by_steps
from experiment.console import console
from experiment.errors import InputError
from experiment.invocation import command
from experiment.nn.hardware import default_precision
from experiment.runs.checkpoints import BestCheckpoint, ExactResume, StepCheckpoint
from experiment.runs.loggers import MetricsFile, RunLogger
from experiment.runs.run import CONFIG, agreed, hold_run_dir, resolve_run_dir
from experiment.runs.stopping import FiniteLoss
from experiment.sources.configurations import read_configuration
from experiment.sources.paths import repaired, write_text

DESCRIPTIONS = {
    "fit": "Train a model. All output goes to the run's folder.",
    "validate": "Evaluate a checkpoint on the validation split.",
    "test": "Evaluate a checkpoint on the test split.",
    "predict": "Apply a checkpoint to your own texts; results are shown and written to predictions.jsonl.",
}


class ExperimentCLI(LightningCLI):
    """LightningCLI with ``--run_dir``, checkpoints, a metrics file and the precision that is fastest here.

    A flag overrides a config file, and a config file overrides the values stored in a checkpoint; a checkpoint
    that does not fit is refused before anything runs.

    Args:
        module: The LightningModule.
        data: The LightningDataModule.
        callbacks: Callbacks that are always active and need no configuration.
        args: Command line arguments, by default the process's own.
    """

    package: str  # the experiment's name, and its part of the default run folder
    shown_as_written = False  # whether ``predict`` shows its results token by token

    # Key, class, and arguments known only later, of the parts that can be checked separately.
    parts: Sequence[tuple[str, type, dict[str, Any]]] = ()

    def __init__(
        self,
        module: type[LightningModule],
        data: type[LightningDataModule],
        callbacks: Sequence[Callback],
        args: Sequence[str] | None,
    ) -> None:
        self.arguments = sys.argv[1:] if args is None else list(args)
        self.callbacks = callbacks
        options = {"exit_on_error": False, "default_env": True, "allow_abbrev": False}
        commands = {
            name: {
                **options,
                "env_prefix": f"TINYLAB_{name.upper()}",
                "usage": f"{command(self.package)} {name} [--config FILE ...] [--OPTION VALUE ...]",
                "description": description,
            }
            for name, description in DESCRIPTIONS.items()
            if name in self.subcommands()
        }
        with ExitStack() as self.until_the_end:
            super().__init__(
                module,
                data,
                args=self.arguments,
                save_config_callback=None,
                parser_class=ExperimentParser,
                trainer_defaults={
                    "enable_model_summary": False,
                    # Our batch schedules share the data among processes, without counting a sample twice.
                    "use_distributed_sampler": False,
                },
                parser_kwargs={**options, "env_prefix": "TINYLAB", "prog": command(self.package), **commands},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )

    # options

    def subcommands(self) -> dict[str, set[str]]:
        """Arguments of the Trainer's methods that are no options, for the given command only, since each parser takes
        0.05 s; for all commands if none is given."""
        skipped = {"ckpt_path", "weights_only", "return_predictions"}
        commands = {name: methods | skipped for name, methods in LightningCLI.subcommands().items()}
        named = next(iter(configs_first(self.arguments)[0]), None)
        return {named: commands[named]} if named in commands else commands

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help=f"Folder of this run. By default runs/{self.package}/NAME, with the first config's name, and "
            "-2, -3 … if that is taken.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="The checkpoint to use: last or best of the run, or a file. With fit, training resumes from it.",
        )
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=42,
            help="Seed of all random numbers, so that a run can be repeated; true picks a random seed.",
        )
        parser.add_argument(
            "--report", type=bool, default=True, help="Write report.html to the run's folder at the end of fit."
        )
        parser.add_argument("--debug", action="store_true", help="Show tracebacks and the libraries' own messages.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """As Lightning's, without its warning if the caller passes arguments, as tests and tables do."""
        # Repair text that the locale could not decode, but not file names, whose bytes must not change.
        given = [argument if _names_file(argument) else repaired(argument) for argument in args]
        if any(name.startswith("TINYLAB_") and "__" in name for name in os.environ):  # which nothing else rejects
            from experiment.renamed import rename_environment

            rename_environment([f"TINYLAB_{name.upper()}__" for name in DESCRIPTIONS])
        try:
            self._parse(parser, given)
        except (ArgumentError, InputError):  # perhaps a name from the last release
            from experiment.renamed import accept_old_names, current_arguments

            accept_old_names()
            self._parse(parser, current_arguments(given))
        config = self.config[self.config.subcommand]
        # If Lightning saw this, the checkpoint's hyperparameters would override the user's flags.
        self.ckpt_path = config.pop("ckpt_path")
        if config.seed_everything is True:  # Lightning would use 0
            config.seed_everything = int(agreed("seed", _drawn_seed))
        if not 0 <= config.seed_everything < 2**32:
            raise InputError(f"seed_everything {config.seed_everything}: expected 0 to {2**32 - 1}, true or false")

    def _parse(self, parser: LightningArgumentParser, given: list[str]) -> None:
        self.flags = {flag.removeprefix("--").partition("=")[0] for flag in given if flag.startswith("--")}
        ordered, configs = configs_first(given)
        for file in configs:
            read_configuration(file)  # reports file and line of a mistake, unlike the parser
        try:
            self.config = parser.parse_args(ordered)
        except ValueError as error:  # from a default that jsonargparse cannot merge with the given value
            raise InputError(str(error)) from error

    # instances

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        configs = [Path(str(path)) for path in config.get("config") or []]
        self.run_dir = resolve_run_dir(self.package, self.subcommand, config.run_dir, configs, self.ckpt_path)
        self.checkpoint: Path | None = None
        if self.ckpt_path is not None:
            from experiment.runs.reading import resolve_checkpoint, verify_together

            self.checkpoint = resolve_checkpoint(self.subcommand, self.run_dir, self.ckpt_path)
            if self.checkpoint is not None:
                verify_together(self.checkpoint)
        elif self.subcommand == "predict":
            raise InputError("predict needs --ckpt_path: last or best of the run, or a file")
        if config.trainer.precision is None:
            config.trainer.precision = default_precision(config.trainer.accelerator)
        self.complete(config)
        self.kept_config = self.config.clone()
        self.adjust(config)

    def stored(self, part: Literal["weights", "outline"] = "outline") -> dict[str, Any]:
        """The checkpoint's contents; empty without a checkpoint."""
        if self.checkpoint is None:
            return {}
        from experiment.runs.reading import read_checkpoint

        return read_checkpoint(self.checkpoint, part)

    def complete(self, config: Namespace) -> None:
        """Fill in values for the run's config.yaml."""

    def adjust(self, config: Namespace) -> None:
        """Fill in values for this call only, such as paths that can change."""

    def instantiate_classes(self) -> None:
        try:
            with self.weights_device():
                super().instantiate_classes()
        except ValueError as error:  # a configuration rejected by a dataclass or a constructor
            from experiment.commands.mistakes import mistakes

            found = [str(error), *mistakes(self.config[self.subcommand], self.parts)]
            raise InputError("; ".join(dict.fromkeys(found))) from error
        if self.checkpoint is not None:
            from experiment.runs.reading import check_fits

            check_fits(self.model, self.checkpoint)
        elif self.subcommand != "fit":
            console.print("note: without --ckpt_path the model has its initial weights")

    def weights_device(self) -> AbstractContextManager:
        """The device on which the model is created: the CPU."""
        return nullcontext()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        callbacks = [ExactResume(), *_as_list(config.callbacks), FiniteLoss(), *self.callbacks]
        if config.enable_progress_bar is not False:
            from experiment.progress import RunProgressBar

            callbacks.append(RunProgressBar(self.shown_as_written))
        loggers: list[Logger] | bool = False
        if self.subcommand == "fit":
            loggers = [MetricsFile(self.run_dir), *(one for one in _as_list(config.logger) if isinstance(one, Logger))]
        if self.subcommand == "predict":  # one process writes the one file, however the training was configured
            kwargs |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        kwargs |= {"logger": loggers, "callbacks": callbacks, "default_root_dir": str(self.run_dir)}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:  # such as a missing accelerator
            raise InputError(f"trainer: {error}") from error
        leave_sigterm_alone(trainer)
        validate_by_steps(trainer)
        given = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = self.datamodule.accumulation(trainer.world_size, given)
        if isinstance(trainer.strategy, DDPStrategy):  # all our buffers are constants: positions, rotary tables
            keep_buffers_local(trainer)
        return trainer

    # commands

    def check_fit(self) -> None:
        """Reject what cannot be trained, before anything is written."""
        for name in ("max_steps", "max_epochs", "limit_train_batches"):
            if self.checkpoint is None and getattr(self.trainer, name) == 0:
                raise InputError(f"trainer.{name} 0: nothing would be trained; give a larger number, or leave it out")
        self.model.check_trainer(self.trainer)
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.datamodule.check(self.trainer)

    def before_fit(self) -> None:
        self.check_fit()
        stored = self.stored()
        finished = self.checkpoint is not None and self._is_finished(stored)
        loggers = [logger for logger in self.trainer.loggers if isinstance(logger, RunLogger)]
        for logger in loggers:
            logger.check()
        if rank_zero_only.rank == 0:
            self.until_the_end.enter_context(hold_run_dir(self.run_dir, resumed=self.ckpt_path is not None))
        if not finished:  # else the configuration has no effect
            self._save_config()
        if self.trainer.is_global_zero:
            from experiment.runs.provenance import RunRecord, command_line

            step = stored.get("global_step", 0)
            self.record = RunRecord(
                self.run_dir, command_line(self.package, self.arguments, self.checkpoint is not None)
            )
            self.record.begin(self.trainer, self.model, step)
            for logger in loggers:
                logger.begin(self.trainer, self.run_dir, self.package, self.record.record, step)
        step = self.datamodule.describe_step(self.trainer.world_size, self.trainer.accumulate_grad_batches)
        rank_zero_only(console.print)(step)
        if self.checkpoint is not None:
            rank_zero_only(console.print)(f"resuming from {self.checkpoint}")

    def _is_finished(self, stored: Mapping[str, Any]) -> bool:
        """Check that training can resume from a checkpoint; True if nothing is left to do."""
        self.model.on_load_checkpoint(dict(stored))
        if position := stored.get(type(self.datamodule).__qualname__):
            self.datamodule.load_state_dict(position)
        from experiment.runs.reading import check_resume, note_other_data

        note_other_data(self.run_dir, self.datamodule.path)
        limit = check_resume(self.trainer, self.model, stored, self.checkpoint)
        if limit is not None:
            held, option = f"{self.checkpoint.name} has {stored['global_step']} steps", limit.partition(" ")[0]
            console.print(f"note: nothing is left to train: {held}, and {limit} is given; raise --{option} to continue")
        return limit is not None

    @rank_zero_only
    def _save_config(self) -> None:
        """Write config.yaml: all values used, except those of this call only."""
        config = yaml.safe_load(self.parser.dump(self.kept_config, skip_none=False))["fit"]
        for name in ("config", "run_dir", "ckpt_path", "debug"):
            config.pop(name, None)
        (self.run_dir / "checkpoints").mkdir(exist_ok=True)
        write_text(self.run_dir / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def fit(self, **arguments: Any) -> None:
        try:
            self.trainer.fit(**arguments, ckpt_path=self.checkpoint and str(self.checkpoint))
        finally:
            if self.trainer.is_global_zero:
                with suppress(OSError):  # a full disk, which is reported elsewhere
                    self.record.end(self.trainer.global_step)

    def validate(self, **arguments: Any) -> None:
        self._evaluate(self.trainer.validate, **arguments)

    def test(self, **arguments: Any) -> None:
        self._evaluate(self.trainer.test, **arguments)

    def _evaluate(self, run: Callable[..., Any], verbose: bool, **arguments: Any) -> None:
        run(**arguments, ckpt_path=self.checkpoint and str(self.checkpoint), verbose=False)
        if verbose:
            from experiment.progress import print_figures

            print_figures(self.trainer.callback_metrics, explained=True)

    def predict(self, **arguments: Any) -> None:
        # Predictions are written as they come; otherwise all would be kept in memory.
        self.trainer.predict(**arguments, ckpt_path=self.checkpoint and str(self.checkpoint), return_predictions=False)

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.end(self.run_dir)
        from experiment.commands.ending import tell_ending

        if kept := tell_ending(self.trainer, self.run_dir, self.config["fit"].report):
            console.print(f"next: {self.next_command(kept)}")

    def next_command(self, kept: str) -> str:
        """The command to use the trained model; `kept` is the available checkpoint, best or last."""
        return f"{command(self.package)} predict --config {shlex.quote(str(self.run_dir / CONFIG))} --ckpt_path {kept}"


def _names_file(argument: str) -> bool:
    return os.path.exists(argument) or os.path.exists(argument.partition("=")[2])


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _drawn_seed() -> str:
    """A random seed; in processes that Lightning starts, the first process's."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and "PL_GLOBAL_SEED" in os.environ:
        return os.environ["PL_GLOBAL_SEED"]
    return str(secrets.randbelow(2**32))
