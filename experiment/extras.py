"""Packages that only some uses need, which pyproject.toml lists as extras."""

from importlib.util import find_spec

from experiment.errors import InputError


def require(package: str, extra: str) -> None:
    """Check that a package of an extra is installed.

    Raises:
        InputError: It is not.
    """
    if find_spec(package) is None:
        raise InputError(f"{package} is not installed: pip install '.[{extra}]' in tinylab's folder")
