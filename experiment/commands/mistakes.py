"""What is wrong with a command, looked for once something was refused, so that it is told all at once."""

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
    try:  # nothing but its numbers: what else it takes may not have been made
        Trainer(**{**numbers, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "logger": False})
    except (MisconfigurationException, ValueError, TypeError) as error:
        yield f"trainer: {error}"


def run_of_another_package(package: str, args: Sequence[str]) -> str | None:
    """What to say where a command line, its command first, names a run of another package; None where it does not."""
    words, configs = configs_first(args)
    parts = [part for word in words for part in word.split("=", 1)]
    runs = [config.parent for config in configs]
    runs += [run_of(value) for flag, value in pairwise(parts) if flag == "--ckpt_path"]
    for run in filter(is_run, runs):
        with suppress(InputError):
            if (other := package_of(find_checkpoint(run))) != package:
                return f"{run} is a run of {other}: use {command(other)} {args[0]} …"
    return None
