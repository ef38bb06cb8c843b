"""The command `tinylab`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from experiment.startup import answer, end_at_interrupt, imports_are_done

OVERVIEW = """
usage: tinylab COMMAND [ARGUMENTS]

A small laboratory for language models.

commands:
  lm         train, validate, test and use the language model
  classify   train, validate, test and use the classifier
  tell       talk to a language model in the terminal
  play       open a local page to try runs
  convert    export and import: transformers, llama2.c, GGUF and PEFT
  decoding   compare ways of decoding on one model
  compare    compare configurations, with several seeds and equal budgets
  board      add or rerun entries of the board, and write it
  report     write the report of one or several runs
  summary    print a table of runs and their results
  letters    write the letters that the demo's model is adapted to

`tinylab COMMAND --help` explains each.
"""  # not a docstring: `python -OO` strips those
COMMANDS = {
    "lm": "lm.__main__",
    "classify": "classify.__main__",
    "tell": "lm.tell",
    "play": "experiment.pages.play",
    "convert": "lm.convert",
    "decoding": "lm.decoding.strategies",
    "compare": "experiment.compare.runner",
    "board": "lm.board",
    "report": "experiment.pages.report",
    "summary": "experiment.pages.summary",
    "letters": "lm.data.demo_letters",
}  # imported only when called, since some import torch


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; an unknown one ends with one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"tinylab {version('tinylab')}")
        sys.exit()
    answer(OVERVIEW, args, COMMANDS, options_first=False)
    end_at_interrupt()
    command = import_module(COMMANDS[args[0]])
    imports_are_done()
    command.main(args[1:])


if __name__ == "__main__":
    main()
