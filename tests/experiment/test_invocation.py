"""Commands that messages name can be pasted into the shell that the program was started from."""

import os
import sys
from pathlib import Path

import pytest

from experiment.invocation import command
from experiment.wording import as_called


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """bin/ of a virtual environment in the working directory, which is not on the PATH."""
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    for name in ("tinylab", "python"):
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([".venv/bin/tinylab", "lm", "fit"], ".venv/bin/tinylab lm"),
        ([".venv/bin/python", "-m", "lm", "fit"], ".venv/bin/python -m lm"),
        ([".venv/bin/python", "-m", "lm.tell", "runs/demo/lm"], ".venv/bin/python -m lm"),
        (["python", "-u", "-m", "lm", "fit"], "python -m lm"),
        (["python", "-m", "tinylab", "lm", "fit"], "python -m tinylab lm"),
        (["python", "notebook.py", "-m"], ".venv/bin/python -m lm"),
        (["python", "-m", "pytest", "-m", "lm"], ".venv/bin/python -m lm"),
    ],
)
def test_command_is_called_as_the_process_was(
    words: list[str], expected: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_script = words[0].endswith("tinylab")
    monkeypatch.setattr(sys, "orig_argv", [str(installed / "python"), *words] if is_script else words)
    monkeypatch.setattr(sys, "argv", [words[0] if is_script else "somewhere.py"])
    assert command("lm") == expected


def test_tinylab_is_named_alone_where_the_shell_finds_it(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "notebook.py"])
    monkeypatch.setenv("PATH", str(installed))
    assert command("lm fit") == "tinylab lm fit"
    monkeypatch.setattr(sys, "argv", [str(installed / "tinylab")])
    assert command("tell") == "tinylab tell"
    monkeypatch.setattr(sys, "argv", [os.path.join("other/bin", "tinylab")])
    assert command("tell") == "other/bin/tinylab tell"


def test_texts_name_commands_as_they_are_called_and_once(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lm", "--help"])
    text = as_called("`tinylab lm` and `tinylab convert`, in tinylab's folder")
    assert text == "`python -m lm` and `python -m tinylab convert`, in tinylab's folder"
    assert as_called(text) == text
