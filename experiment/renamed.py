"""Names that changed since the last release: the old ones still work in commands, YAML files and checkpoints."""

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

RENAMED = {
    # options
    "data.beginnings": "data.extra_first_windows",
    "model.generation.weights": "model.generation.weight_dtype",
    # values of options
    "data.evaluation=report": "data.evaluation=first_window",
    "model.adapter=none": "model.adapter=full",
    # classes that a configuration names
    "experiment.sharding.FullyShardedStrategy": "experiment.runs.sharding.FullyShardedStrategy",
    "experiment.wandb_logger.WandbLogger": "experiment.pages.wandb_logger.WandbLogger",
    # files
    "configs/classify/report.yaml": "configs/classify/paper.yaml",
    "configs/lm/report.yaml": "configs/lm/paper.yaml",
}
DATA_MODULES = {"IMDB": "TextClassificationDataModule", "TinyStories": "TextDataModule"}  # as checkpoints know them


@cache
def accept_old_names() -> None:
    """From now on, read configurations with today's names."""
    load_yaml = get_loader("yaml")

    def load(text: str) -> Any:
        loaded = load_yaml(text)
        return current_config(loaded) if isinstance(loaded, dict) else loaded

    set_loader("yaml", load, (yaml.YAMLError,))


def current_arguments(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with today's names."""
    words, option = [], ""
    for word in arguments:
        flag, separator, value = word.partition("=")
        if word.startswith("--"):
            option = _current(flag[2:])
            words.append(f"--{option}{separator}{_current_word(option, value)}")
        else:
            words.append(_current_word(option, word))
    return words


def rename_environment(prefixes: Sequence[str]) -> None:
    """Rename option variables, such as TINYLAB_FIT__DATA__PATH with the prefix TINYLAB_FIT__, to today's
    names; a variable already set under today's name wins."""
    for variable in list(os.environ):
        for prefix in (one for one in prefixes if variable.startswith(one)):
            option = _current(variable.removeprefix(prefix).replace("__", ".").lower())
            value = _current_word(option, os.environ.pop(variable))
            os.environ.setdefault(f"{prefix}{option.replace('.', '__').upper()}", value)


def _current_word(option: str, value: str) -> str:
    return current_file(value) if option == "config" else _current_value(option.rstrip("+"), value)


def current_config(config: Mapping[str, Any], within: str = "", note: bool = True) -> dict[str, Any]:
    """The content of a YAML file with today's names; `within` are the keys above it, with a dot at the end."""
    renamed = {}
    for key, value in config.items():
        name = _current(f"{within}{key}", note)
        if isinstance(value, dict):
            value = current_config(value, f"{name}.", note)
        elif isinstance(value, str):
            value = _current_value(name, value, note)
        elif isinstance(value, list):
            value = [current_config(item, note=note) if isinstance(item, dict) else item for item in value]
        renamed[name.removeprefix(within)] = value
    return renamed


def current_file(path: str) -> str:
    """A configuration file by today's name, if the old one no longer exists."""
    old = next((file for file in RENAMED if file.endswith(".yaml") and path.endswith(file)), None)
    return path if old is None or Path(path).exists() else path.removesuffix(old) + _current(old)


def current_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Rename the contents of a Lightning checkpoint to today's names."""
    for old, new in DATA_MODULES.items():
        if old in checkpoint:
            checkpoint[new] = checkpoint.pop(old)
    if isinstance(given := checkpoint.get("hyper_parameters"), dict):
        checkpoint["hyper_parameters"] = current_config(given, "model.", note=False)


def _current_value(option: str, value: str, note: bool = True) -> str:
    if option.rpartition(".")[2] in ("class_path", "logger", "strategy"):
        return _current(value, note)
    return _current(f"{option}={value}", note).removeprefix(f"{option}=")


def _current(name: str, note: bool = True) -> str:
    if note and name in RENAMED:
        _note(name)
    return RENAMED.get(name, name)


@cache  # once
def _note(name: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        new = RENAMED[name]
        print(f"note: {name} is now {new}; the old name works until the next release", file=sys.stderr)
