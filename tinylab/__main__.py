"""The command `tinylab`."""

import sys
from collections.abc import Sequence
from importlib import import_module

from experiment.startup import answer

OVERVIEW = """
usage: tinylab COMMAND [ARGUMENTS]

A small laboratory for language models.

commands:
  lm         train, validate, test and use the language model
  classify   train, validate, test and use the classifier
  tell       talk to a language model in the terminal
  play       a local page to try runs
  convert    models to and from transformers, llama2.c, GGUF and PEFT
  decoding   compare ways of decoding on one model
  compare    configurations side by side, with several seeds and equal budgets
  board      entries of the board, and the board itself
  report     the page of a run, or of several over each other
  summary    what runs did, in a table
  letters    write the texts that the demo's model is adapted to

`tinylab COMMAND --help` explains each.
"""  # no docstring: `python -OO` has none
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
}  # each imported only when it is called, for some bring torch along


def main(args: Sequence[str] | None = None) -> None:
    """Run one of the commands; an unknown one ends with one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if args is None else args)
    answer(OVERVIEW, args, COMMANDS, options_first=False)
    import_module(COMMANDS[args[0]]).main(args[1:])


if __name__ == "__main__":
    main()
