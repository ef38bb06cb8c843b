"""All mistakes in a command, collected after the first error so that they are reported together."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiment.commands.parser import configs_first
from experiment.errors import InputError
from experiment.invocation import command
from experiment.runs.reading import find_checkpoint, package_of
from experiment.runs.run import is_run, run_of


def mistakes(config: Namespace, parts: Sequence[tuple[str, type, dict[str, Any]]]) -> Iterator[str]:
    """Args as the command line's: the options of one command, and `ExperimentCLI.parts`."""
    for name, part, given in parts:
        try:
            part(**{**config[name].as_dict(), **given})
        except ValueError as error:
            yield str(error)
    numbers = {name: value for name, value in config.trainer.as_dict().items() if isinstance(value, int | float)}
    try:  # only its numbers: its other arguments may not exist yet
        Trainer(**{**numbers, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "logger": False})
    except (MisconfigurationException, ValueError, TypeError) as error:
        yield f"trainer: {error}"


def run_of_another_package(package: str, args: Sequence[str]) -> str | None:
    """The message if a command line (command first) names a run of the other package; else None."""
    words, configs = configs_first(args)
    parts = [part for word in words for part in word.split("=", 1)]
    runs = [config.parent for config in configs]
    runs += [run_of(value) for flag, value in pairwise(parts) if flag == "--ckpt_path"]
    for run in filter(is_run, runs):
        with suppress(InputError):
            if (other := package_of(find_checkpoint(run))) != package:
                return f"{run} is a run of {other}: use {command(other)} {args[0]} …"
    return None
