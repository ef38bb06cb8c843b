"""What the commands beside lm and classify have in common: their parser, the words of a `fit`, errors of one line."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, dict_to_namespace, get_loader

from experiment.errors import InputError
from experiment.renamed import current_file
from experiment.wording import as_called, reworded


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are of one line, as everywhere: no usage before them.

    Args:
        prog: Such as ``tinylab tell``.
        description: Its first paragraph is shown, or the `whole`.
    """

    def __init__(self, prog: str, description: str | None = None, whole: bool = False, **options: Any) -> None:
        about = as_called(description or "")  # no docstring: `python -OO` has none
        if whole:
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(
            as_called(prog), description=about if whole else about.partition("\n\n")[0], allow_abbrev=False, **options
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a command with one line on stderr and exit code 2 where its input, or the disk, cannot be used."""
    try:
        yield
    except (InputError, argparse.ArgumentError) as error:
        message = reworded(str(error))
    except OSError as error:  # no space, no permission
        message = f"{error.filename or 'writing'}: {error.strerror}; free space, or give another place"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def as_value(word: Any) -> Any:
    """The value that a word of the command line stands for, as `fit` reads it; 1.0 is 1."""
    with suppress(yaml.YAMLError):
        word = get_loader("yaml")(word) if isinstance(word, str) else word
    return int(word) if isinstance(word, float) and word.is_integer() else word


def merged(configs: Sequence[str], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration files over each other, and flags, named with dots, over these."""
    whole = Namespace()
    for values in (*(dict_to_namespace(read_yaml(config)) for config in configs), flags):
        for name, value in values.items():  # of a namespace, with dots
            whole[name] = as_value(value)
    return whole.as_dict()


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The content of a YAML file; an InputError where there is none, or no names with values in it."""
    try:
        return {**yaml.safe_load(Path(current_file(str(file))).read_text(encoding="utf-8"))}
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}): expected names with values, as in configs/") from error


def read_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Configurations and flags among the words that follow a `fit`; an InputError for a word that is neither."""
    rest, named = iter(words), []
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise InputError(f"{word}: expected a flag of fit, such as --data.batch_size=8")
        named.append((name[2:], value if equals else next(rest, "true")))
    return [value for name, value in named if name == "config"], {n: v for n, v in named if n != "config"}
