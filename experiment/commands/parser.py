"""The parser of the command lines, and of configurations in YAML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from experiment.errors import InputError
from experiment.sources.paths import user_path

WORDS = ("no", "yes", "on", "off")


class RepeatedKey(yaml.YAMLError):
    """A mapping has a key twice, of which YAML's readers keep the last without a word."""


def load_yaml(text: str) -> Any:
    """As jsonargparse's loader, but a key that stands twice is an error that names its lines, and in a list no, yes, on
    and off are words: to YAML 1.1 they are false and true, and classes of these names were lost."""
    words = []
    nodes = [yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            words += [item for item in node.value if item.tag.endswith(":bool") and item.value.lower() in WORDS]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if str(key.value) in lines:
                    lines_of = f"in lines {lines[str(key.value)]} and {line}"
                    raise RepeatedKey(f"{key.value} stands twice, {lines_of}: join the two")
                lines[str(key.value)] = line
                nodes.append(value)
    for word in sorted(words, key=lambda word: -word.start_mark.index):
        begin, end = word.start_mark.index, word.end_mark.index
        text = f"{text[:begin]}'{word.value}'{text[end:]}"
    return _load_yaml(text)


_load_yaml = get_loader("yaml")
set_loader("yaml", load_yaml, (yaml.YAMLError,))


def check_configuration(file: Path) -> None:
    """Check that a configuration is text that names options, none of them twice.

    Raises:
        InputError: It is not; the message names the file.
    """
    try:
        options = load_yaml(user_path(file).read_text(encoding="utf-8"))
    except RepeatedKey as error:
        raise InputError(f"config {file}: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config {file} is no text in UTF-8 ({error.reason}): expected a YAML file") from error
    except OSError as error:
        from experiment.wording import unreadable_config

        raise InputError(unreadable_config(file, error)) from error
    except (ValueError, yaml.YAMLError):  # which the parser tells
        return
    if not isinstance(options, dict):
        found = "nothing" if options is None else f"{str(options)[:40]!r}"
        raise InputError(f"config {file} holds {found}: expected options, such as seed_everything: 1")


def configs_first(args: Sequence[str]) -> tuple[list[str], list[Path]]:
    """The arguments with each ``--config`` before the flags, in their order: a flag wins wherever it stands. And the
    files that are named so."""
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
    return [*others[:1], *configs, *others[1:]], files  # the first of the others is the command


class ExperimentParser(LightningArgumentParser):
    """Lightning's parser, whose help shows the Trainer's many options after those of the experiment, as plain text."""

    def format_help(self) -> str:
        from experiment.compat.jsonargparse import move_group_last
        from experiment.wording import plain_help

        if trainer := self.groups.get("trainer"):
            trainer.title = "Lightning's Trainer"
            move_group_last(self, trainer)
        self.default_env = False  # else each option would name its variable
        return plain_help(super().format_help())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        from experiment.compat.jsonargparse import option_strings
        from experiment.wording import reworded

        super().error(reworded(message, option_strings(self)), ex)
