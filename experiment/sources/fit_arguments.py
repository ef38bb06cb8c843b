"""Reads configurations and flags of `fit` without its parser, for comparisons and bag of words."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml
from jsonargparse import Namespace, dict_to_namespace, get_loader

from experiment.errors import InputError
from experiment.renamed import current_file
from experiment.sources.configurations import read_configuration


def as_value(word: Any) -> Any:
    """The value of a command-line word, as `fit` reads it; 1.0 is 1."""
    with suppress(yaml.YAMLError):
        word = get_loader("yaml")(word) if isinstance(word, str) else word
    return int(word) if isinstance(word, float) and word.is_integer() else word


def merged(configs: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration files merged in order, with flags (dotted names) on top."""
    whole = Namespace()
    for values in (*(dict_to_namespace(read_configuration(current_file(config))) for config in configs), flags):
        for name, value in values.items():  # of a namespace, with dots
            whole[name] = as_value(value)
    return whole.as_dict()


def read_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The configurations and flags among the arguments of `fit`; an InputError for any other word."""
    rest, named = iter(words), []
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise InputError(f"{word}: expected a flag of fit, such as --data.batch_size=8")
        named.append((name[2:], value if equals else next(rest, "true")))
    return [value for name, value in named if name == "config"], {n: v for n, v in named if n != "config"}
