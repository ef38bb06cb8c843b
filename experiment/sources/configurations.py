"""YAML configurations, with one-line errors."""

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from experiment.errors import InputError
from experiment.sources.paths import user_path

WORDS = ("no", "yes", "on", "off")
_load_yaml = get_loader("yaml")


class RepeatedKey(yaml.YAMLError):
    """A mapping has a duplicate key; YAML readers silently keep the last one."""


def load_yaml(text: str) -> Any:
    """As jsonargparse's loader, but a duplicate key is an error that names its lines, and in a list no, yes, on
    and off are words: YAML 1.1 reads them as booleans, which would lose classes with these names."""
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
                    raise RepeatedKey(f"{key.value} is given twice, {lines_of}: merge the two")
                lines[str(key.value)] = line
                nodes.append(value)
    for word in sorted(words, key=lambda word: -word.start_mark.index):
        begin, end = word.start_mark.index, word.end_mark.index
        text = f"{text[:begin]}'{word.value}'{text[end:]}"
    return _load_yaml(text)


def read_configuration(file: str | Path) -> dict[str, Any]:
    """The options of a configuration and their values, without duplicates.

    Raises:
        InputError: It cannot be read, or is not a configuration; the message names the file and the line.
    """
    try:
        options = load_yaml(user_path(file).read_text(encoding="utf-8"))
    except RepeatedKey as error:
        raise InputError(f"config {file}: {error}") from error
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: {error.problem}" if error.problem_mark else error.problem
        raise InputError(f"config {file} is not YAML ({where}): expected options such as seed_everything: 1") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config {file} is not UTF-8 text ({error.reason}): expected a YAML file") from error
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"config {file} is not YAML ({why}): expected options such as seed_everything: 1") from error
    except OSError as error:
        from experiment.wording import unreadable_config

        raise InputError(unreadable_config(Path(file), error)) from error
    if not isinstance(options, dict):
        found = "nothing" if options is None else f"{str(options)[:40]!r}"
        raise InputError(f"config {file} holds {found}: expected options, such as seed_everything: 1")
    return options
