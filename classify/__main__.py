"""The classifier's command line: `tinylab classify`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiment.startup import start

if TYPE_CHECKING:
    from classify.cli import ClassifyCLI

OVERVIEW = """
usage: tinylab classify COMMAND [--config FILE ...] [--OPTION VALUE ...]

The classifier: BERT with LoRA, by hand or by PEFT, that learns to judge reviews.

commands:
  fit        train; a run's folder takes the checkpoints, metrics, the adapter and the report
  validate   loss, accuracy and F1 of a checkpoint on the validation split
  test       the same on the test split
  predict    let a checkpoint judge texts

`tinylab classify COMMAND --help` lists all options of a command. Each may stand in a YAML file, of which several may be
given, or be an environment variable (TINYLAB_FIT__DATA__PATH is fit's --data.path); a flag wins. --print_config shows
what would be used.

examples:
  tinylab classify fit      --config configs/classify/custom.yaml
  tinylab classify validate --config configs/classify/custom.yaml --ckpt_path best
  tinylab classify predict  --config configs/classify/custom.yaml --ckpt_path best --data.texts '["I loved it."]'

Beside it: `tinylab compare configs/comparisons/table1.yaml` lays many such runs side by side.
"""  # no docstring: `python -OO` has none


def main(args: Sequence[str] | None = None) -> "ClassifyCLI":
    """Run the command line; `args` stands in for that of the process."""
    start(OVERVIEW, sys.argv[1:] if args is None else args)
    from classify.cli import ClassifyCLI
    from experiment.commands.main import run  # brings Lightning, which --help need not wait for

    return run(ClassifyCLI, args)


if __name__ == "__main__":
    main()
