"""The parser of the command lines, and of configurations in YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import set_loader
from lightning.pytorch.cli import LightningArgumentParser

from experiment.sources.configurations import load_yaml

set_loader("yaml", load_yaml, (yaml.YAMLError,))


def configs_first(args: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The arguments with every ``--config`` before the flags, in order, so that flags always win; and the
    configuration files."""
    configs: list[str] = []
    others: list[str] = []
    left = list(args)
    while left:
        argument = left.pop(0)
        if argument in ("-c", "--config") and left:
            configs.append(f"--config={left.pop(0)}")
        elif argument.startswith("--config="):
            configs.append(argument)
        else:
            others.append(argument)
    files = [Path(config.removeprefix("--config=")) for config in configs]
    return [*others[:1], *configs, *others[1:]], files  # the first other word is the command


class ExperimentParser(LightningArgumentParser):
    """Lightning's parser, with plain-text help that lists the Trainer's many options after the experiment's."""

    def format_help(self) -> str:
        from experiment.compat.jsonargparse import move_group_last
        from experiment.wording import plain_help

        if trainer := self.groups.get("trainer"):
            trainer.title = "Lightning's Trainer"
            move_group_last(self, trainer)
        self.default_env = False  # else the help of each option would show its variable
        return plain_help(super().format_help())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        from experiment.compat.jsonargparse import option_strings
        from experiment.wording import reworded

        super().error(reworded(message, option_strings(self)), ex)
