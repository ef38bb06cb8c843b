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
  fit        train; a run's folder takes the checkpoints, metrics, samples and the report
  validate   loss, perplexity and bits per byte of a checkpoint on the validation split
  test       the same on the test split
  predict    let a checkpoint continue prompts

`tinylab lm COMMAND --help` lists all options of a command. Each may stand in a YAML file, of which several may be
given, or be an environment variable (TINYLAB_FIT__DATA__PATH is fit's --data.path); a flag wins. --print_config shows
what would be used.

examples:
  tinylab lm fit      --config configs/lm/demo.yaml
  tinylab lm validate --config configs/lm/demo.yaml --ckpt_path best
  tinylab lm predict  --config configs/lm/demo.yaml --ckpt_path best --data.prompts '["Once upon a time"]'

Beside it: `tinylab convert` takes weights in and out, `tinylab decoding` compares ways of decoding,
`tinylab compare` configurations, at equal tokens or time.
"""  # no docstring: `python -OO` has none


def main(args: Sequence[str] | None = None) -> "LanguageCLI":
    """Run the command line; ``args`` are by default those of the process."""
    start(OVERVIEW, sys.argv[1:] if args is None else args)
    from experiment.commands.main import run  # brings Lightning, which --help need not wait for
    from lm.cli import LanguageCLI

    return run(LanguageCLI, args)


if __name__ == "__main__":
    main()
