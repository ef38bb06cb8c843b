"""All mistakes in a command, collected after the first error so that they are reported together."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiment.commands.parser import configs_first
from experiment.errors import InputError
from experiment.invocation import command
from experiment.renamed import current_file
from experiment.runs.reading import of_another_package
from experiment.runs.run import is_run, run_of
from experiment.sources.configurations import read_configuration
from experiment.sources.paths import user_path

# Options that only configurations of one package give.
OWN = {
    "lm": {"model.decoder", "model.optimizer", "model.generation", "model.init_from", "model.variant", "model.lora",
           "data.vocab_size", "data.sequence_length", "data.packing", "data.prompts"},
    "classify": {"model.name", "model.target_modules", "model.modules_to_save", "model.lora_dropout", "model.warmup",
                 "data.train_size", "data.max_length", "data.truncation", "data.texts"},
}  # fmt: skip


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


def package_of_configuration(config: Mapping[str, Any]) -> str | None:
    """The package whose options a configuration gives; None if it gives those of neither, or of both."""
    groups = {name: value for name, value in config.items() if isinstance(value, dict)}
    given = {f"{group}.{name}" for group, values in groups.items() for name in values}
    found = [package for package, own in OWN.items() if own & given]
    return found[0] if len(found) == 1 else None


def run_of_another_package(package: str, args: Sequence[str]) -> str | None:
    """The message if a command line (command first) names a run or a configuration of the other package; else None."""
    if single := next((word for word in args if re.match("-[a-z_]{2}", word)), None):
        return f"{single}: options begin with two dashes; did you mean -{single}?"
    words, configs = configs_first(args)
    parts = [part for word in words for part in word.split("=", 1)]
    runs = [config.parent for config in configs]
    for value in (value for flag, value in pairwise(parts) if flag == "--ckpt_path"):
        with suppress(InputError):
            runs += [user_path(value), run_of(value)]
    for run in filter(is_run, runs):
        if line := of_another_package(run, package):
            return f"{line} {args[0]} …"
    for file in configs:
        with suppress(InputError):
            other = package_of_configuration(read_configuration(current_file(str(file))))
            if other not in (None, package):
                return f"{file} is a configuration of {other}: use {command(other)} {args[0]} …"
    return None
