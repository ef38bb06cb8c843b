"""Checks a mapping read from a file: its keys, and the kind of value of each."""

from collections.abc import Iterable, Mapping
from types import GenericAlias
from typing import Any

from experiment.errors import InputError
from experiment.wording import hint, listed

NUMBER, TEXTS, NUMBERS, MAPPINGS = int | float, list[str], list[int], dict[str, dict]
KINDS = {
    str: "a text",
    int: "a whole number",
    NUMBER: "a number",
    list: "a list",
    TEXTS: "a list of texts",
    NUMBERS: "a list of whole numbers",
    dict: "a mapping, such as {name: value}",
    MAPPINGS: "a mapping of mappings, such as {title: {name: value}}",
}


def check_keys(values: Any, kinds: Mapping[str, Any], where: str = "", required: Iterable[str] = ()) -> dict[str, Any]:
    """Check the keys of a mapping and their values.

    Args:
        values: The mapping.
        kinds: For each allowed key, one of KINDS or a tuple of the allowed values; null is always allowed.
        where: The beginning of error messages.
        required: Keys that must have a value.

    Returns:
        The mapping without null values.

    Raises:
        InputError: A key or value is not allowed, or missing.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}{values}: expected {KINDS[dict]}")
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{where}{name}: there is no such key{hint(str(name), kinds)}; expected {listed(kinds)}")
        kind = kinds[name]
        if value is not None and not _is(value, kind):
            raise InputError(
                f"{where}{name} {value}: expected {listed(kind) if isinstance(kind, tuple) else KINDS[kind]}"
            )
    for name in required:
        if not values.get(name):
            raise InputError(f"{where}{name}: not given")
    return {name: value for name, value in values.items() if value is not None}


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
        return False
    if isinstance(kind, GenericAlias):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind.__origin__) and all(isinstance(item, kind.__args__[-1]) for item in items)
    return isinstance(value, kind)
