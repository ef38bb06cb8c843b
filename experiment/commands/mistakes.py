"""What the parts of a configuration refuse, once one was refused: it is told all at once."""

from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


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
