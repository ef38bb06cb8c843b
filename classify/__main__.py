"""The classifier's command line: `tinylab classify`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiment.startup import start

if TYPE_CHECKING:
    from classify.cli import ClassifyCLI

OVERVIEW = """
usage: tinylab classify COMMAND [--config FILE ...] [--OPTION VALUE ...]

The classifier: BERT with LoRA, our own or PEFT's, that learns to classify reviews.

commands:
  fit        train; checkpoints, metrics, the adapter and the report go to the run's folder
  validate   loss, accuracy and F1 of a checkpoint on the validation split
  test       the same on the test split
  predict    classify texts with a checkpoint

`tinylab classify COMMAND --help` lists all options of a command. Each can be set in YAML files (--config can be
repeated) or as an environment variable (TINYLAB_FIT__DATA__PATH is fit's --data.path); flags win. --print_config shows
the result.

examples:
  tinylab classify fit      --config configs/classify/custom.yaml
  tinylab classify validate --config configs/classify/custom.yaml --ckpt_path best
  tinylab classify predict  --config configs/classify/custom.yaml --ckpt_path best --data.texts '["I loved it."]'

See also: `tinylab compare configs/comparisons/table1.yaml` compares many such runs.
"""  # not a docstring: `python -OO` strips those


def main(args: Sequence[str] | None = None) -> "ClassifyCLI":
    """Run the command line; `args` are by default the process's own."""
    start(OVERVIEW, sys.argv[1:] if args is None else args)
    from classify.cli import ClassifyCLI
    from experiment.commands.main import run  # imports Lightning, which --help does not need

    return run(ClassifyCLI, args)


if __name__ == "__main__":
    main()
