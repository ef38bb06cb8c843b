"""The language model's command line: `tinylab lm`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiment.startup import start

if TYPE_CHECKING:
    from lm.cli import LanguageCLI

OVERVIEW = """
usage: tinylab lm COMMAND [--config FILE ...] [--OPTION VALUE ...]

The language model: a LLaMA-style decoder that learns to tell stories.

commands:
  fit        train; checkpoints, metrics, samples and the report go to the run's folder
  validate   loss, perplexity and bits per byte of a checkpoint on the validation split
  test       the same on the test split
  predict    continue prompts with a checkpoint

`tinylab lm COMMAND --help` lists all options of a command. Each can be set in YAML files (--config can be
repeated) or as an environment variable (TINYLAB_FIT__DATA__PATH is fit's --data.path); flags win. --print_config shows
the result.

examples:
  tinylab lm fit      --config configs/lm/demo.yaml
  tinylab lm validate --config configs/lm/demo.yaml --ckpt_path best
  tinylab lm predict  --config configs/lm/demo.yaml --ckpt_path best --data.prompts '["Once upon a time"]'

See also: `tinylab convert` exports and imports weights, `tinylab decoding` compares decoding methods,
`tinylab compare` compares configurations at equal tokens or time.
"""  # not a docstring: `python -OO` strips those


def main(args: Sequence[str] | None = None) -> "LanguageCLI":
    """Run the command line; ``args`` are by default the process's own."""
    start(OVERVIEW, sys.argv[1:] if args is None else args)
    from experiment.commands.main import run  # imports Lightning, which --help does not need
    from lm.cli import LanguageCLI

    return run(LanguageCLI, args)


if __name__ == "__main__":
    main()
