"""Validates one model over several splits in a row, in processes that a launcher has started side by side.

The arguments: a file of cells, each a list of arguments of ``python -m lm validate``, and the file for what they give.
"""

import json
import os
import sys
from pathlib import Path

from lm.__main__ import main

if __name__ == "__main__":
    cells, results = json.loads(Path(sys.argv[1]).read_text()), []
    for cell in cells:
        cli = main(["validate", *cell])
        figures = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        results.append(figures)
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(results))
