"""How the user calls tinylab, so that commands in messages can be pasted into the same shell."""

import os
import shutil
import sys
from pathlib import Path

MODULES = ("lm", "classify", "experiment", "tinylab")


def command(name: str) -> str:
    """A command of tinylab, such as ``lm fit``, called as this process was.

    It is ``tinylab lm fit`` by default and ``python -m lm fit`` if started with ``python -m``. If the shell would
    find no ``tinylab``, or a different one, the path of the script or the interpreter is included.
    """
    started, found = sys.orig_argv, shutil.which("tinylab")
    module = started[started.index("-m") + 1] if "-m" in started[:-1] else ""
    if module.partition(".")[0] not in MODULES:
        script = sys.argv[0] if Path(sys.argv[0]).name == "tinylab" else found
        if script is not None:
            known = found is not None and Path(found).resolve() == Path(script).resolve()
            return f"{'tinylab' if known else _nearer(script)} {name}"
        started = [sys.executable]
    own = name.partition(" ")[0] in MODULES and module != "tinylab"
    return f"{_nearer(started[0])} -m {name if own else f'tinylab {name}'}"


def _nearer(program: str) -> str:
    """The path relative to the working directory if inside it. Links are kept: a venv's interpreter is a link."""
    near = os.path.relpath(program) if os.path.isabs(program) else program
    return program if near.startswith("..") else near
