"""Every command of README.md and docs/ is run, shrunk to a second or two, in order and in one working directory."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest

from classify.reviews import synthetic_reviews
from experiment.compare.comparison import read_comparison
from tests.classify.conftest import save_tiny_bert
from tests.runs import STORIES, TINY, write_stories
from tinylab.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
# In the order in which a reader meets them: the demo's run, for one, is trained by the page that explains runs.
PAGES = [ROOT / "docs" / "configuration.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("[!c]*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
LM = [*TINY, "--data.path=stories", "--model.decoder.max_sequence_length=64", "--trainer.max_steps=2",
      "--trainer.val_check_interval=2", "--samples.every_n_steps=0"]  # fmt: skip
CLASSIFY = ["--model.name=bert", "--data.path=demo", "--data.train_size=16", "--data.validation_size=8",
            "--data.test_size=8", "--data.max_length=32", "--data.batch_size=8", "--trainer.accelerator=cpu",
            "--trainer.max_epochs=1"]  # fmt: skip
SHRUNK = {"lm": LM, "classify": CLASSIFY}
TRAINED = [
    ["configs/lm/demo.yaml"],
    ["configs/lm/demo_letters.yaml"],
    ["configs/classify/custom.yaml"],
    ["configs/classify/demo.yaml"],
]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SIMPLE = ("lm.convert", "lm.data.demo_letters", "experiment.pages.report", "experiment.pages.summary")


def commands_of(readme: str) -> list[str]:
    """The lines of the fenced blocks and what else looks like a command, each once and in order."""
    found: list[str] = []
    readme = re.sub(r"```\w+\n.*?```", "", readme, flags=re.DOTALL)  # other languages have tests of their own
    for block, code in re.findall(r"```\n(.*?)```|`([^`]+)`", readme.replace("\\\n", " "), re.DOTALL):
        code = " ".join(code.split())
        is_command = re.match(r"(make|wandb|python -m \S+|tinylab \S+) |python tests/", code)
        found += block.splitlines() if block else [code] if is_command else []
    for row in re.findall(r"^\|(.*)\|$", readme, re.MULTILINE):  # a result's configuration and the flags beside it
        config, *flags = re.findall("`([^`]+)`", row.split("|")[1]) or [""]
        if config.startswith("configs/") and flags:
            found.append(f"python -m {Path(config).parts[1]} fit --config {' '.join([config, *flags])}")
    return [one for one in dict.fromkeys(found) if not any(other.startswith(f"{one} ") for other in found)]


def recipe(target: list[str]) -> Iterator[list[str]]:
    """The commands that a make target would run, as their words."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    make = ["make", "--dry-run", "--assume-old=.venv/.ready", *target]
    printed = subprocess.run(make, cwd=ROOT, env=ours, check=True, capture_output=True, text=True).stdout
    for line in printed.replace("\\\n", " ").splitlines():
        if not line.startswith(("echo ", "awk ", "make: ")):
            yield shlex.split(line)


def call(module: str, *args: str) -> None:
    """``python -m module args`` in this process; another exit code than 0 is an error."""
    module = f"{module}.__main__" if module in SHRUNK else module
    try:
        import_module(module).main(list(args))
    except SystemExit as exit_:
        if exit_.code:
            raise RuntimeError(f"ended with exit code {exit_.code}") from exit_


def perform(words: list[str]) -> None:
    """One command, shrunk by a rule of its kind."""
    match words:
        case ["make", *target]:
            for command in recipe(target):
                perform(command)
        case ["tinylab", command, *args] | [_, "-m", "tinylab", command, *args]:
            module = COMMANDS[command].removesuffix(".__main__").removesuffix(".strategies").removesuffix(".runner")
            perform(["python", "-m", module, *args])
        case [_, "-m", ("lm" | "classify") as package, command, *args]:
            configs = [after for name, after in pairwise(args) if name == "--config"]
            if any(config.startswith("configs/") for config in configs):
                own = any(name == "--data.path" and Path(after).is_file() for name, after in pairwise(args))
                args += [flag for flag in SHRUNK[package] if not (own and flag.partition("=")[0] in args)]
            if command == "fit" and configs not in TRAINED:  # other configurations have tests that train them
                args.append("--print_config")
            if (package, command) == ("lm", "predict"):
                args.append("--model.generation.max_new_tokens=4")
            call(package, command, *args)
        case [_, "-m", "lm.decoding", *args]:
            call("lm.decoding.strategies", *args, "--max_new_tokens=4")
        case [_, "-m", module, *args] if module in SIMPLE:
            for run in args:
                if run.endswith("-2"):  # the same configuration a second time
                    shutil.copytree(run.removesuffix("-2"), run)
            call(module, *args)
        case [_, "-m", "experiment.compare", file, *args]:  # tests/test_comparisons.py makes the runs
            row = read_comparison([file, *args])[0].rows[0]
            perform(["python", "-m", row.package, "fit", *row.arguments, "--print_config"])
        case ["torchrun", *args]:  # of each machine; the test of two is with those of several processes
            perform(["python", *args[args.index("-m") :]])
        case ["wandb", command, *args]:  # needs its server: its own parser must know the options
            import_module("wandb.cli.cli").cli.commands[command].make_context(command, args)
        case [_, "tests/benchmarks/loader.py"]:
            loader = import_module("loader")
            loader.main(path="stories", vocab_size=345, seconds=0.01)
        case [_, file, *args] if file.startswith("tests/benchmarks/"):  # takes minutes: its parser knows the options
            with patch.object(sys, "argv", [file, *args, "--help"]), pytest.raises(SystemExit, match=r"^0$"):
                runpy.run_path(str(ROOT / file), run_name="__main__")
        case ["mkdir" | "ln", *_]:
            subprocess.run(words, check=True)
        case ["PYTHONPATH=.", _, "docs/pictures.py"]:
            pass  # takes pictures of the page in a browser
        case [_, "-m", "experiment.pages.play" | "lm.tell" as module, *args]:  # stay open; others talk to them
            call(module, *args, "--help")
        case [_, "-c", "import gradio", *_]:
            pass  # installs what that page needs
        case [_, "-m", "pytest", *_]:
            pass  # it is running
        case _:
            raise NotImplementedError("tests/test_readme.py has no rule for this command: add one to perform()")


@pytest.mark.slow
def test_every_command_of_the_readme_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    workspace = tmp_path / "tinylab"
    workspace.mkdir()
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")  # as when one of its files is run
    (workspace / "configs").symlink_to(ROOT / "configs")
    write_stories(workspace / "stories")
    save_tiny_bert(workspace / "bert")
    (workspace / "stories.txt").write_text("\n\n".join(STORIES))
    reviews = synthetic_reviews("train").select(range(300)).to_pandas()
    reviews["label"] = reviews["label"].map({0: "bad", 1: "good"})
    reviews.to_csv(workspace / "reviews.csv", index=False)
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (workspace / "stories260K").symlink_to(shared / "models" / "stories260K")
    commands = commands_of(README)
    assert len(commands) > 20
    for command in commands:
        if "stories260K" in command and not shared.is_dir():  # a real model, which a user has to fetch
            continue
        try:
            perform(shlex.split(command, comments=True))
        except Exception as error:
            printed = capsys.readouterr()
            pytest.fail(f"{command}\n{type(error).__name__}: {error}\n{printed.err[-1000:]}", pytrace=False)


def test_every_row_of_the_benchmark_has_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    for module, function in set(import_module("bench").ROWS.values()):
        assert callable(getattr(import_module(module), function))


def test_links_between_pages_lead_to_files() -> None:
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        assert not [link for link in links if not (page.parent / link).exists()], page


def test_pictures_are_small_and_made_by_a_command() -> None:
    script = (ROOT / "docs" / "pictures.py").read_text(encoding="utf-8")
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert pictures
    assert not [one.name for one in pictures if one.name not in script or one.stat().st_size > 200_000]


def test_pages_name_nothing_outside_the_repository() -> None:
    assert "../shared" not in README


def test_files_and_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z][\w-]*)", "".join(re.findall(r"`[^`]+`|```.*?```", README, re.DOTALL))))
    assert {"demo", "test"} <= targets
    assert not [target for target in targets if not re.search(rf"^{target}( [\w-]+)*:", makefile, re.MULTILINE)]
    files = re.findall(r"`((?:configs|tests|lm|classify|experiment)/[\w/.]+\.(?:py|yaml))", README)
    assert len(files) > 20
    assert not [file for file in files if not (ROOT / file).is_file()]
