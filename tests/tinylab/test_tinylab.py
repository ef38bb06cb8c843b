"""The command `tinylab`, and the Python interface that the README shows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import tinylab
from classify.__main__ import main as classify
from experiment.errors import InputError
from experiment.invocation import command as called
from lm.__main__ import main as lm
from tests.runs import TINY, write_stories
from tinylab.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_bert_run: list[str]) -> Path:
    """The folder runs/ with a tiny demo/lm and demo/custom."""
    folder = tmp_path_factory.mktemp("tinylab")
    flags = [*TINY, f"--data.path={write_stories(folder / 'stories')}", "--trainer.max_steps=5"]
    lm(["fit", *flags, f"--run_dir={folder / 'runs/demo/lm'}"])
    classify(["fit", *small_bert_run, f"--run_dir={folder / 'runs/demo/custom'}"])
    return folder


@pytest.fixture(scope="module")
def small_bert_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from tests.classify.conftest import save_tiny_bert

    sizes = ["--data.train_size=16", "--data.validation_size=8", "--data.test_size=8", "--data.max_length=32"]
    bert = save_tiny_bert(tmp_path_factory.mktemp("bert"))
    return [f"--model.name={bert}", "--data.path=demo", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", *sizes]


@pytest.mark.slow
def test_python_of_the_readme_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["story"].startswith("Once upon a time")
    assert sum(names["probabilities"].values()) == pytest.approx(1)
    assert names["metrics"]["val/perplexity"] > 1


@pytest.mark.slow
def test_the_same_seed_tells_the_same_story(runs: Path) -> None:
    first, second = (tinylab.load(runs / "runs/demo/lm").tell("Tom", temperature=1.0, seed=3) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_a_list_gives_a_list_of_what_each_text_gives_alone(runs: Path) -> None:
    teller, judge = (tinylab.load(runs / "runs/demo" / name) for name in ("lm", "custom"))
    beginnings = ["Tom had a ball.", "Once"]
    alone = [teller.tell(text, temperature=0, max_new_tokens=9) for text in beginnings]
    assert teller.tell(beginnings, temperature=0, max_new_tokens=9) == alone
    assert judge.classify(beginnings) == [judge.classify(text) for text in beginnings]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"temp": 1}, TypeError, "tell() has no setting 'temp' (did you mean temperature?): expected max_new_tokens"),
        ({"temperature": "hot"}, TypeError, "temperature='hot': expected 0 (greedy) or a positive number"),
        ({"temperature": -1}, ValueError, "temperature=-1: expected 0 (greedy) or a positive number"),
        ({"top_k": 2.5}, ValueError, "top_k=2.5: expected a whole number"),
        ({"max_new_tokens": None}, ValueError, "max_new_tokens=None: expected a whole number"),
        ({"beginning": 5}, TypeError, "5: expected a text or a list of texts"),
        ({"beginning": ["Tom", None]}, TypeError, "['Tom', None]: expected a text or a list of texts"),
        ({"beginning": " "}, ValueError, "Type a beginning first"),
    ],
)
def test_what_tell_cannot_use_is_told_in_the_words_of_the_caller(
    runs: Path, given: dict, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=re.escape(said)):
        tinylab.load(runs / "runs/demo/lm").tell(**{"beginning": "Tom", **given})


@pytest.mark.slow
def test_texts_may_come_as_a_column_or_a_generator(runs: Path) -> None:
    judge, texts = tinylab.load(runs / "runs/demo/custom"), ["A good film.", "Dull."]
    expected = judge.classify(texts)
    assert (
        judge.classify(pd.Series(texts)) == judge.classify(np.array(texts)) == judge.classify(iter(texts)) == expected
    )
    for wrong in ([1, 2], None, {"text": "A good film."}):
        with pytest.raises(TypeError, match="expected a text or a list of texts"):
            judge.classify(wrong)


@pytest.mark.slow
def test_evaluate_raises_for_what_it_cannot_use_and_prints_nothing(runs: Path, capsys: pytest.CaptureFixture) -> None:
    run = runs / "runs/demo/lm"
    expected = tinylab.evaluate(run)
    assert tinylab.evaluate(run / "checkpoints/best.ckpt") == expected
    assert not capsys.readouterr().out
    with pytest.raises(InputError, match=re.escape("--data.pth: there is no such option (did you mean --data.path?)")):
        tinylab.evaluate(run, "--data.pth", "x")
    with pytest.raises(InputError, match=r"data\.path './x' does not exist"):
        tinylab.evaluate(run, "--data.path", "./x")


@pytest.mark.slow
def test_the_likeliest_class_comes_first(runs: Path) -> None:
    probabilities = list(tinylab.load(runs / "runs/demo/custom").classify("A good film.").values())
    assert probabilities == sorted(probabilities, reverse=True)


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"):
        tinylab.load(tmp_path)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("clasify", "classify"),
        ("fit", f"{called('lm fit')} or {called('classify fit')}"),
        ("import", called("convert import")),
    ],
)
def test_an_unknown_command_names_near_ones_and_the_known(word: str, near: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([word])
    assert f"{word!r} is not a command (did you mean {near}?): expected lm, classify" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "usage:" in capsys.readouterr().out


def test_help_needs_no_library() -> None:
    listed = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
    code = f"{listed} from tinylab.__main__ import main; main(['--help'])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "usage: " in printed and printed.endswith("False\n")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not exit_.value.code and capsys.readouterr().out == f"tinylab {project['version']}\n"
