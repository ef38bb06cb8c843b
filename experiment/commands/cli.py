"""The command line of both experiments: LightningCLI, with a folder for each run and errors that can be read."""

import errno
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from experiment.commands.checks import check_training
from experiment.commands.parser import ExperimentParser, check_configuration, reworded
from experiment.commands.signals import ended_by_signals, leave_signals_to_us
from experiment.errors import InputError
from experiment.nn.hardware import default_precision
from experiment.pages.report import write_report
from experiment.pages.wandb_logger import WandbLogger
from experiment.progress import RunProgressBar, console, validation_results
from experiment.quiet import quiet_libraries
from experiment.renamed import current_arguments
from experiment.runs.checkpoints import BestCheckpoint, ExactResume, StepCheckpoint
from experiment.runs.finite import FiniteLoss
from experiment.runs.interruption import Interrupted
from experiment.runs.launch import agreed, leave_slurm_alone, waited_in_vain
from experiment.runs.metrics_file import MetricsFile
from experiment.runs.provenance import RunRecord, command_line
from experiment.runs.run import (
    CONFIG,
    check_fits,
    check_free,
    read_checkpoint,
    resolve_checkpoint,
    resolve_run_dir,
    verify_together,
)
from experiment.sources.batches import validate_by_steps
from experiment.sources.rows import repaired

DESCRIPTIONS = {
    "fit": "Train a model. What it learns and shows lies in the run's folder.",
    "validate": "Evaluate a checkpoint on the validation split.",
    "test": "Evaluate a checkpoint on the test split.",
    "predict": "Use a checkpoint on texts of your own; the results are shown and written to predictions.jsonl.",
}
LOCK_PATIENCE = 6.0  # seconds
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


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

    example = ""  # what ``predict`` can be given, for the hint at the end of fit
    shown_as_written = False  # whether ``predict`` shows its results token by token

    # Key, class, and what is only known later, of those parts that can be checked each by itself.
    parts: Sequence[tuple[str, type, dict[str, Any]]] = ()

    def __init__(
        self,
        package: str,
        module: type[LightningModule],
        data: type[LightningDataModule],
        callbacks: Sequence[Callback],
        args: Sequence[str] | None,
    ) -> None:
        self.package = package
        self.command = command_line(package, sys.argv[1:] if args is None else args)
        self.callbacks = callbacks
        # Errors are printed by ``run``, on one line.
        options = {"exit_on_error": False, "default_env": True, "allow_abbrev": False}
        super().__init__(
            module,
            data,
            args=None if args is None else list(args),
            save_config_callback=None,
            parser_class=ExperimentParser,
            trainer_defaults={
                "enable_model_summary": False,
                # Our batch schedules share the data among processes, without counting a sample twice.
                "use_distributed_sampler": False,
            },
            parser_kwargs={
                **options,
                "env_prefix": "TINYLAB",
                "prog": f"python -m {package}",
                **{
                    name: {
                        **options,
                        "env_prefix": f"TINYLAB_{name.upper()}",
                        "usage": f"python -m {package} {name} [--config FILE ...] [--OPTION VALUE ...]",
                        "description": description,
                    }
                    for name, description in DESCRIPTIONS.items()
                },
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that are not its to ask for."""
        skipped = {"ckpt_path", "weights_only", "return_predictions"}
        return {name: methods | skipped for name, methods in LightningCLI.subcommands().items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        arguments["ckpt_path"] = self.checkpoint and str(self.checkpoint)
        if subcommand == "predict":
            arguments["return_predictions"] = False  # they are written as they come, and else all kept in memory
        return arguments

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help=f"Folder of this run. By default runs/{self.package}/NAME, NAME being that of the first config, with "
            "-2, -3 … where taken.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="The checkpoint to use: last or best of the run, or a file. With fit, training goes on from it.",
        )
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=42,
            help="Seed of all random numbers, so that a run can be repeated; true draws one.",
        )
        parser.add_argument(
            "--report", type=bool, default=True, help="Write report.html into the run's folder at the end of fit."
        )
        parser.add_argument("--debug", action="store_true", help="Show tracebacks and the libraries' own messages.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """As Lightning's, without its warning where a caller gives the arguments: the tests and tables do."""
        given = current_arguments(sys.argv[1:] if args is None else args)
        # Text that the locale could not read, but no name of a file, whose bytes must stay as they are.
        given = [argument if _names_file(argument) else repaired(argument) for argument in given]
        self.flags = {flag.removeprefix("--").partition("=")[0] for flag in given if flag.startswith("--")}
        ordered = configs_first(given)
        for before, argument in zip(["", *ordered], ordered, strict=False):
            if before in ("-c", "--config") or argument.startswith("--config="):
                check_configuration(Path(argument.removeprefix("--config=")))
        try:
            self.config = parser.parse_args(ordered)
        except ValueError as error:  # of a default that jsonargparse cannot combine with what is given
            raise InputError(str(error)) from error

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the hyperparameters of a checkpoint override flags; here the user wins."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        configs = [Path(str(path)) for path in config.get("config") or []]
        self.run_dir = resolve_run_dir(self.package, self.subcommand, config.run_dir, configs, config.ckpt_path)
        self.checkpoint = resolve_checkpoint(self.subcommand, self.run_dir, config.ckpt_path)
        self._as_given = {}
        if self.checkpoint is not None:
            verify_together(self.checkpoint)
        if self.subcommand == "predict" and self.checkpoint is None:
            raise InputError("predict needs --ckpt_path: last or best of the run, or a file")
        if config.trainer.precision is None:
            config.trainer.precision = default_precision(config.trainer.accelerator)
        config.trainer.default_root_dir = str(self.run_dir)

    def set_for_this_call(self, key: str, value: Any) -> None:
        """Use another value than the configuration's, which config.yaml keeps as it was given."""
        config = self.config[self.subcommand]
        self._as_given[key] = config[key]
        config[key] = value

    def _set_seed(self) -> None:
        """As Lightning's, which for `true` takes 0 rather than a seed that is drawn."""
        config = self.config[self.subcommand]
        if config.seed_everything is True:
            config.seed_everything = int(agreed("seed", _drawn_seed))
        if not 0 <= config.seed_everything < 2**32:
            raise InputError(f"seed_everything {config.seed_everything}: expected 0 to {2**32 - 1}, true or false")
        super()._set_seed()

    def instantiate_classes(self) -> None:
        try:
            with self.weights_device():
                super().instantiate_classes()
        except ValueError as error:  # a configuration that a dataclass or a constructor refuses
            raise InputError("; ".join(dict.fromkeys([str(error), *self.mistakes()]))) from error
        if self.checkpoint is not None:
            check_fits(self.model, self.checkpoint)
        elif self.subcommand != "fit":
            console.print("note: no --ckpt_path was given, so the model has its initial weights")

    def weights_device(self) -> AbstractContextManager:
        """Where the weights of the model are made, which is the CPU."""
        return nullcontext()

    def mistakes(self) -> Iterator[str]:
        """What the other parts of a configuration refuse, once one was refused."""
        config = self.config[self.subcommand]
        for name, part, given in self.parts:
            try:
                part(**{**config[name].as_dict(), **given})
            except ValueError as error:
                yield str(error)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        loggers = [logger for logger in _as_list(config.logger) if isinstance(logger, Logger)]
        training = self.subcommand == "fit"
        callbacks = [ExactResume(), *_as_list(config.callbacks), FiniteLoss(), *self.callbacks]
        if config.enable_progress_bar is not False:
            callbacks.append(RunProgressBar(self.shown_as_written))
        if self.subcommand == "predict":  # one process writes the one file, whatever the training was configured for
            kwargs |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        metrics = MetricsFile(self.run_dir)
        try:
            trainer = super().instantiate_trainer(
                logger=[metrics, *loggers] if training else False, callbacks=callbacks, **kwargs
            )
        except (MisconfigurationException, ValueError, TypeError) as error:  # such as an accelerator that is not there
            raise InputError(f"trainer: {error}") from error
        metrics.trainer = trainer
        leave_signals_to_us(trainer)
        validate_by_steps(trainer)
        trainer.accumulate_grad_batches = self.datamodule.accumulation(
            trainer.world_size, trainer.accumulate_grad_batches
        )
        if isinstance(trainer.strategy, DDPStrategy):  # all buffers here are constants: positions, rotary tables
            trainer.strategy._ddp_kwargs.setdefault("broadcast_buffers", False)
        return trainer

    def before_fit(self) -> None:
        # What data and checkpoint do not allow is told before anything is written.
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        check_training(self.trainer, self.datamodule)
        finished = self.checkpoint is not None and self._check_resume(read_checkpoint(self.checkpoint, part="outline"))
        for logger in self._wandb_loggers():
            logger.log_in()
        if rank_zero_only.rank == 0:
            self._take_folder()
        if not finished:  # else the configuration has no effect
            self._save_config()
        for logger in self.trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(_step_of(self.checkpoint))
        self.record = RunRecord(self.run_dir, self.command)
        if self.trainer.is_global_zero:
            self.record.begin(self.trainer, self.model, _step_of(self.checkpoint))
            for logger in self._wandb_loggers():
                logger.begin(self.trainer, self.run_dir, self.package, self.record.record)
        step = self.datamodule.describe_step(self.trainer.world_size, self.trainer.accumulate_grad_batches)
        rank_zero_only(console.print)(step)
        if self.checkpoint is not None:
            rank_zero_only(console.print)(f"resuming from {self.checkpoint}")

    def _check_resume(self, stored: Mapping[str, Any]) -> bool:
        """See that a checkpoint can be gone on from as the run is configured now; whether nothing is left to train.

        Raises:
            InputError: It cannot.
        """
        self.model.on_load_checkpoint(dict(stored))
        if position := stored.get(type(self.datamodule).__qualname__):
            self.datamodule.load_state_dict(position)
        try:
            epochs = stored["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        except (KeyError, TypeError):  # an imported model
            return False
        groups = [len(group["params"]) for group in self.model.parameter_groups()]
        states = stored.get("optimizer_states", [])
        before = [len(group["params"]) for state in states for group in state.get("param_groups", [])]
        if before not in ([], groups):
            raise InputError(
                f"{self.checkpoint} is of another optimizer: its groups hold {before} weights, expected {groups}; give "
                "the options, and the version of tinylab, that it was trained with, or begin a new run"
            )
        loop, steps = self.trainer.fit_loop, stored["global_step"]
        if 0 <= self.trainer.max_steps <= steps:
            limit = f"trainer.max_steps {self.trainer.max_steps}"
        elif loop.max_epochs is not None and 0 <= loop.max_epochs <= epochs:
            limit = f"trainer.max_epochs {loop.max_epochs}"
            loop.max_epochs = epochs  # Lightning refuses a smaller one
        else:
            return False
        console.print(f"note: nothing is left to train: {self.checkpoint.name} has {steps} steps, and {limit} is given")
        return True

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as self._until_the_end:
            super()._run_subcommand(subcommand)

    def _take_folder(self) -> None:
        """Hold the run's folder until the command ends, so that no other training writes into it."""
        # The workers of a training that was killed hold its lock for some seconds more.
        lock = FileLock(self.run_dir / ".lock", timeout=LOCK_PATIENCE)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._until_the_end.enter_context(lock)
        except Timeout as error:
            raise InputError(
                f"run_dir {self.run_dir} is being written by another training: wait for its end, or name another folder"
            ) from error
        except NotImplementedError:  # a file system without locks
            pass
        except OSError as error:
            raise _unwritable(self.run_dir, error) from error
        check_free(self.run_dir, resumed=self.config["fit"].ckpt_path is not None)  # another may have been quicker

    @rank_zero_only
    def _save_config(self) -> None:
        """Write config.yaml: everything that was really used, except for what belongs to this one call."""
        try:
            (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            config = self.config["fit"].clone()
            for key, value in self._as_given.items():
                config[key] = value
            config = yaml.safe_load(self._parser("fit").dump(config, skip_none=False))
            for name in ("config", "run_dir", "ckpt_path", "debug"):
                config.pop(name, None)
            config["trainer"]["default_root_dir"] = None
            partial = self.run_dir / f"{CONFIG}.partial"
            partial.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
            partial.replace(self.run_dir / CONFIG)
        except OSError as error:
            raise _unwritable(self.run_dir, error) from error

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:
            return
        self.record.end(self.trainer.global_step)
        for logger in self._wandb_loggers():
            logger.end(self.run_dir)
        console.print(f"\nfinished after {self.trainer.global_step:,} steps; everything lies in {self.run_dir}")
        for name, value in validation_results(self.trainer).items():
            console.print(f"  {name:<20} {value:.4f}")
        if self.config["fit"].report and (self.run_dir / "metrics.csv").exists():
            with console.status("drawing the report"):
                page = write_report([self.run_dir])
            console.print(f"report: {page}")
        checkpoints = self.run_dir / "checkpoints"
        if kept := next((name for name in ("best", "last") if (checkpoints / f"{name}.ckpt").exists()), None):
            config = shlex.quote(str(self.run_dir / CONFIG))
            command = f"python -m {self.package} predict --config {config} --ckpt_path {kept}"
            console.print(f"next: {command} {self.example}")

    def _wandb_loggers(self) -> list[WandbLogger]:
        return [logger for logger in self.trainer.loggers if isinstance(logger, WandbLogger)]


def configs_first(args: Sequence[str]) -> list[str]:
    """The arguments with each ``--config`` before the flags, in their order: a flag wins wherever it stands."""
    configs: list[str] = []
    others: list[str] = []
    left = list(args)
    while left:
        argument = left.pop(0)
        if argument in ("-c", "--config") and left:
            configs += [argument, left.pop(0)]
        elif argument.startswith("--config="):
            configs.append(argument)
        else:
            others.append(argument)
    return [*others[:1], *configs, *others[1:]]  # the first of the others is the command


def _names_file(argument: str) -> bool:
    return os.path.exists(argument) or os.path.exists(argument.partition("=")[2])


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"run_dir {folder} cannot be written ({error.strerror}): choose another with --run_dir")


def _drawn_seed() -> str:
    """A seed by chance; that of the first process in those that Lightning starts beside it."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and "PL_GLOBAL_SEED" in os.environ:
        return os.environ["PL_GLOBAL_SEED"]
    return str(secrets.randbelow(2**32))


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(read_checkpoint(checkpoint, part="outline")["global_step"])


def run(cli: type[ExperimentCLI], args: Sequence[str] | None = None) -> ExperimentCLI:
    """Run an experiment's command line.

    Bad input ends with one line on stderr and exit code 2; ``--debug`` shows the traceback as well. So does a disk
    that is full or cannot be written. Ctrl-C ends with exit code 130 and SIGTERM with 143, as shells have it. Every
    other exception is a bug and passes.

    Args:
        cli: The experiment's own subclass of ExperimentCLI, which takes ``args`` alone.
        args: Command line arguments, by default those of the process.
    """
    given = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in given
    quiet_libraries(debug)
    leave_slurm_alone()
    console.quiet = rank_zero_only.rank != 0  # of several processes one speaks
    try:
        with ended_by_signals():
            return cli(args)
    except (InputError, jsonargparse.ArgumentError, MisconfigurationException) as error:  # the last is Lightning's own
        if debug:
            raise
        print(f"error: {reworded(str(error), ())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if debug or error.errno not in UNWRITABLE:
            raise
        print(
            f"error: {error.filename or 'a file'} cannot be written ({error.strerror}): free space or choose another "
            "place with --run_dir",
            file=sys.stderr,
        )
        sys.exit(2)
    except RuntimeError as error:
        if debug or (line := waited_in_vain(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as interruption:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A make target may have hidden the command.
        stopped = "stopped; " if args is not None else f"stopped: {shlex.join(['python', *sys.orig_argv[1:]])}\n"
        console.print(f"{stopped}go on with the same command and --ckpt_path last")
        sys.exit(interruption.exit_code)
    except (KeyboardInterrupt, SystemExit) as ending:  # Lightning turns the first into the second
        terminated = isinstance(ending, SIGTERMException)
        if isinstance(ending, SystemExit) and not isinstance(ending.__context__, KeyboardInterrupt) and not terminated:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        console.print("\ninterrupted")
        sys.exit(143 if terminated else 130)
