"""Private interfaces of argparse, on which jsonargparse's parsers are built."""

from argparse import ArgumentParser
from typing import Any


def move_group_last(parser: ArgumentParser, group: Any) -> None:
    """Make ``--help`` show a group of options after all others."""
    parser._action_groups.sort(key=lambda other: other is group)  # stable: the others keep their order


def option_strings(parser: Any) -> list[str]:
    """Every option of a jsonargparse parser and of its subcommands, ``--`` included."""
    commands = parser._subcommands_action.choices.values() if parser._subcommands_action else ()
    return [option for one in (parser, *commands) for option in one._option_string_actions]
