"""What a user reads first: ``--help``, quickly, in the user's words, and nothing left unexplained."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from experiment.invocation import command as called
from experiment.startup import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {"datasets", "matplotlib", "peft", "plotly", "sentencepiece", "sklearn", "transformers", "wandb"}


@pytest.mark.parametrize("package", ["lm", "classify"])
def test_overview_and_unknown_commands_are_answered_without_torch(package: str) -> None:
    listed = "import runpy, sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    run = [sys.executable, "-c", f"{listed} runpy.run_module({package!r}, run_name='__main__', alter_sys=True)"]
    asked, unknown = (subprocess.run([*run, word], cwd=ROOT, capture_output=True, text=True) for word in ("-h", "fti"))
    assert asked.returncode == 0 and asked.stdout.startswith(f"usage: {called(package)} COMMAND")
    assert all(f"\n  {command} " in asked.stdout for command in COMMANDS)
    assert unknown.returncode == 2 and "'fti'" in unknown.stderr.splitlines()[0]
    for answer in (asked, unknown):
        assert not {"torch", "lightning"} & set(answer.stderr.split())


@pytest.mark.parametrize("package", ["lm", "classify"])
def test_every_option_is_explained_and_those_of_the_trainer_come_last(
    package: str, capsys: pytest.CaptureFixture
) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            import_module(f"{package}.__main__").main([command, "--help"])
        shown = capsys.readouterr().out
        assert exit_.value.code == 0
        assert shown.startswith(f"usage: {called(package)} {command} ")
        assert not re.search(r"^  --\S+( \S+)*\s{2,}\(type:", shown, re.MULTILINE)  # a name, and no word on it
        assert not re.search("`|ENV:|:class:|Path to a configuration file\\.", shown)
        assert shown.index("--ckpt_path") < shown.index("--data.path") < shown.index("--trainer.max_steps")


def test_no_module_imports_a_heavy_library_before_it_is_used() -> None:
    for file in (file for package in ("lm", "classify", "experiment") for file in (ROOT / package).glob("*.py")):
        for statement in ast.parse(file.read_text()).body:
            names = [name.name for name in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module] if isinstance(statement, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & HEAVY, f"{file}: {ast.unparse(statement)}"
