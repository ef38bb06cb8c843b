"""What ``tinylab lm --help`` says, and the answer to a command that does not exist.

The command line itself brings Lightning along, which takes seconds; these need not wait for it.
"""

import sys
from collections.abc import Sequence

from experiment.invocation import as_called

COMMANDS = ("fit", "validate", "test", "predict")


def answer(overview: str, args: Sequence[str]) -> None:
    """End here where the arguments ask for the overview (exit code 0), or name no known command (2), or where the
    system is not supported (2)."""
    if sys.platform == "win32":  # has neither signals, locks nor links as they are used here
        print("error: Windows is not supported: expected Linux or macOS; use WSL (wsl --install)", file=sys.stderr)
        sys.exit(2)
    if args and args[0] in ("-h", "--help"):
        print(as_called(overview.strip()))
        sys.exit(0)
    if not args or (not args[0].startswith("-") and args[0] not in COMMANDS):
        found = f"there is no command {args[0]!r}" if args else "no command is given"
        print(f"error: {found}: expected {', '.join(COMMANDS)}; --help explains them", file=sys.stderr)
        sys.exit(2)
