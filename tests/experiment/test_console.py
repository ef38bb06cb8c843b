"""No character ends a run: files are UTF-8 whatever the locale, and a terminal shows what it can."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.runs import TINY

ROOT = Path(__file__).parents[2]


def opened_by_locale(source: str) -> Iterator[ast.Call]:
    """The calls that read or write text and name no encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        name, owner = getattr(node.func, "attr", getattr(node.func, "id", "")), getattr(node.func, "value", None)
        words = [word.value for word in node.args if isinstance(word, ast.Constant)]
        binary = getattr(owner, "id", "") == "os" or any(isinstance(word, str) and "b" in word for word in words)
        if (name in ("read_text", "write_text") and owner) or (name == "open" and not binary):
            yield node


def test_every_text_file_is_opened_with_an_encoding() -> None:
    assert list(opened_by_locale("Path(x).write_text(y); open(x); open(x, 'w'); a.open('r+')"))
    files = [file for package in ("lm", "classify", "experiment", "tinylab") for file in (ROOT / package).rglob("*.py")]
    found = [f"{file}:{call.lineno}" for file in files for call in opened_by_locale(file.read_text(encoding="utf-8"))]
    assert not found


def test_run_under_a_locale_and_an_output_without_the_characters(in_tmp: Path) -> None:
    stories = [f"Zoë had “{thing} number {i}” 🎉 the end." for thing in ("ball", "dog") for i in range(20)]
    rows = "".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories)
    Path("naïve.jsonl").write_text(rows, encoding="utf-8")
    Path("naïve.yaml").write_text("# naïve 🎉\ndata: {batch_size: 4}\n", encoding="utf-8")
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    tiny = [*TINY, "--trainer.max_steps=2", "--samples.every_n_steps=2", "--data.path=naïve.jsonl", "--run_dir=run"]
    command = [sys.executable, "-m", "lm", "fit", "--config=naïve.yaml", *tiny, '--samples.prompts=["Zoë 🎉"]']
    environment = os.environ | locale | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Zo? ?" in done.stdout
    assert "Zoë 🎉" in Path("run/samples.jsonl").read_text(encoding="utf-8")
    assert "naïve.yaml" in Path("run/run.json").read_text(encoding="utf-8")
