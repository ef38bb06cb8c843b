"""Hostile checkpoints, YAML that says a thing twice, classes that cannot be made, other systems and interpreters."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from experiment.nn import hardware
from experiment.startup import answer
from lm.__main__ import main
from tests.runs import TINY, refused, write_stories

ROOT = Path(__file__).parents[2]


def harm(*args, **kwargs) -> None:
    Path("harmed").touch()


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return [f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--samples.every_n_steps=0", "--run_dir=run"]


def test_checkpoint_that_names_an_instantiator_runs_nothing(arguments: list[str]) -> None:
    from lm.training.module import LanguageModel

    main(["fit", *arguments, "--trainer.max_steps=1"])
    file = Path("run/checkpoints/last.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["hyper_parameters"]["_instantiator"] = f"{__name__}.harm"
    file.unlink()
    torch.save(checkpoint, file)
    main(["validate", "--config=run/config.yaml", "--ckpt_path=last"])
    main(["predict", "--config=run/config.yaml", "--ckpt_path=last", "--data.prompts=[Tom]"])
    main(["fit", *arguments, "--trainer.max_steps=2", "--ckpt_path=last"])
    torch.save(checkpoint, file)
    with pytest.raises(Exception, match="instantiator"):  # Lightning's own reader, since 2.6.6
        LanguageModel.load_from_checkpoint(file, weights_only=True)
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data:\n  batch_size: 2\nmodel: {}\ndata:\n  packing: true\n", ["data is given twice, in lines 1 and 4"]),
        ("data:\n  batch_size: 2\n  batch_size: 3\n", ["batch_size is given twice, in lines 2 and 3"]),
    ],
    ids=["section", "option"],
)
def test_key_that_is_given_twice_is_an_error_with_its_lines(
    text: str, words: list[str], arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    Path("twice.yaml").write_text(text)
    error = refused(capsys, "fit", *arguments, "--config=twice.yaml")
    assert all(word in error for word in [*words, "twice.yaml"]), error


@pytest.mark.parametrize(("text", "found"), [("# data: {}\n", "nothing"), ("", "nothing"), ("- 1\n", "'[1]'")])
def test_configuration_without_options_is_told_as_that(
    text: str, found: str, arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    Path("plain.yaml").write_text(text)
    error = refused(capsys, "fit", *arguments, "--config=plain.yaml")
    assert error == f"error: config plain.yaml holds {found}: expected options, such as seed_everything: 1"


def test_brackets_and_colons_in_paths_are_printed_as_they_are(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    from experiment.pages.report import main as report
    from experiment.pages.summary import main as summary

    run = "a[b] [bold]c[/bold] :smile:"
    main(["fit", *arguments, "--trainer.max_steps=1", f"--run_dir={run}"])
    main(["fit", *arguments, "--trainer.max_steps=2", f"--run_dir={run}", "--ckpt_path=last"])
    said = capsys.readouterr().out
    assert f"resuming from {run}/checkpoints/last.ckpt" in said
    assert f"everything is in {run}\n" in said and f"predict --config '{run}/config.yaml'" in said
    main(["predict", f"--config={run}/config.yaml", "--ckpt_path=last", "--data.prompts=[Tom]"])
    assert f"written to {run}/predictions.jsonl" in capsys.readouterr().out
    report([run])
    assert f"written: {run}/report.html" in capsys.readouterr().out
    summary([run])
    assert f"  {run}/  checkpoints, config.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["max_steps", "max_epochs", "limit_train_batches"])
def test_training_of_no_steps_is_refused(limit: str, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert f"trainer.{limit} 0: nothing would be trained" in refused(
        capsys, "fit", *arguments, f"--trainer.{limit}=0", "--run_dir=run"
    )
    assert not Path("run").exists()


def test_logger_that_cannot_be_made_is_told_by_its_own_reason(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    error = refused(capsys, "fit", *arguments, "--trainer.logger=CometLogger")
    assert "CometLogger" in error and "comet" in error and len(error) < 250 and "Union" not in error
    error = refused(capsys, "fit", *arguments, "--trainer.logger=TensorBoardLogger")
    assert "TensorBoardLogger" in error and "save_dir" in error and len(error) < 250


def test_a_name_that_two_classes_have_is_told_with_their_paths(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    import_module("experiment.pages.wandb_logger")
    error = refused(capsys, "fit", *arguments, "--trainer.logger=WandbLogger")
    paths = "lightning.pytorch.loggers.WandbLogger, experiment.pages.wandb_logger.WandbLogger"
    assert error == f"error: WandbLogger: several classes have this name; give the whole path: {paths}"


def test_whatever_a_compiler_lacks_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import TritonMissing

    def missing(function):
        raise TritonMissing(None)

    monkeypatch.setattr(torch, "compile", missing)
    assert hardware.can_compile.__wrapped__("cpu") is False


def test_windows_is_refused_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as exit_:
        answer("usage", ["fit"])
    assert exit_.value.code == 2 and "expected Linux or macOS" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["lm", "classify", "tinylab", "experiment.pages.report", "experiment.pages.play"])
def test_help_is_there_without_docstrings(module: str) -> None:
    command = [sys.executable, "-OO", "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
