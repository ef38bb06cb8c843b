"""What the terminal says: what to do next, figures to read, and one line for what cannot be done."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from experiment import renamed
from experiment.commands.ending import training_loss
from experiment.commands.mistakes import package_of_configuration
from experiment.invocation import command
from experiment.runs.provenance import read_record
from lm.__main__ import main
from lm.convert import main as convert
from tests.lm.test_completions import PAIRS
from tests.runs import STORIES, TINY, refused, write_stories

ROOT = Path(__file__).parents[2]
FIT = ["fit", *TINY, "--trainer.max_steps=1", "--data.sequence_length=32", "--run_dir=run"]


def write_classifier(run: Path) -> None:
    """As much of a classifier's run as its kind is told by."""
    (run / "checkpoints").mkdir(parents=True)
    content = {"state_dict": {"weight": torch.zeros(1)}, "hyper_parameters": {"adapter": "custom"}, "global_step": 1}
    torch.save(content, run / "checkpoints/best.ckpt")


@pytest.fixture
def pairs(in_tmp: Path) -> str:
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return "--data.path=pairs.jsonl"


def test_run_says_what_comes_next_and_evaluation_what_figures_mean(
    pairs: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main([*FIT, pairs, "--ckpt_path=last", f"--data.second_path={write_stories(Path('stories'))}"])
    said = capsys.readouterr().out
    assert "note: run has no checkpoint yet, so training starts at step 0" in said
    assert re.search(
        r"pairs.jsonl has no validation split: \d+ of its \d+ texts held out, too few for a reliable loss",
        " ".join(said.split()),
    )
    assert "--ckpt_path" not in read_record(Path("run"))["calls"][0]["command"]  # nothing was resumed
    results = re.findall(r"^  \w+/\w+ +\d", said, re.MULTILINE)
    assert results[0].startswith("  train/loss")
    assert any("val/second_bits_per_byte" in line for line in results) and len(set(map(len, results))) == 1
    (line,) = re.findall("^next: (.*)$", said, re.MULTILINE)
    *_, flag, prompts = shlex.split(line)
    assert flag == "--data.prompts" and json.loads(prompts)[0] in [pair["prompt"] for pair in PAIRS]

    main(["validate", "--config=run/config.yaml", "--ckpt_path=best"])
    said = capsys.readouterr().out
    assert re.search(r"^  val/perplexity +\d+\.?\d* +exp\(loss\): as uncertain as a choice", said, re.MULTILINE)
    assert not re.search(r"\d\.\d{6}|─", said)
    main(["validate", "--config=run/config.yaml", "--ckpt_path=best", "--verbose=false"])
    assert "val/perplexity" not in capsys.readouterr().out


def test_prompt_to_try_is_the_beginning_of_a_story_of_ones_own(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    main([*FIT, f"--data.path={write_stories(Path('stories'))}"])
    (prompts,) = (json.loads(shlex.split(capsys.readouterr().out)[-1]),)
    assert len(prompts[0].split()) == 4 and STORIES[29].startswith(prompts[0])

    predict = ["predict", "--config=run/config.yaml", "--ckpt_path=best", "--data.prompts=[Tom had]"]
    main([*predict, "--model.generation.max_new_tokens=2"])
    told = capsys.readouterr().out
    assert re.match("Tom had.* …\n", told, re.DOTALL) and "… means cut off, after 2 tokens" in told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/lm/dmeo.yaml"], "configs/lm/dmeo.yaml does not exist (did you mean configs/lm/demo.yaml?)"),
        (["--config=demo"], "config demo does not exist (did you mean configs/lm/demo.yaml?): expected a YAML file"),
        (["--config=configs"], "config configs cannot be read (Is a directory): expected a YAML file"),
        (["--data.batch_size=0", "--data.sequence_length=1", "--trainer.max_steps=-5"],
         "data.sequence_length 1: expected at least 2; data.batch_size 0: expected at least 1; trainer: `max_steps`"),
        (["--data.path=other.jsonl"], "no column 'text', no 'prompt' with its 'completion' and no 'messages'"),
        (["--data.path=./nowhere"], "a hub name such as roneneldan/TinyStories (stories) or stanfordnlp/imdb"),
        (["--max_steps=5"], "--max_steps: there is no such option (did you mean --trainer.max_steps?); --help"),
        (["--max_stps", "5"], "--max_stps: there is no such option (did you mean --trainer.max_steps?); --help"),
        (["--max_new_tokens=5"], "(did you mean --model.generation.max_new_tokens or --samples.max_new_tokens?)"),
        (["--samples.prompts=[Once"], "samples.prompts [Once: expected a list"),
        (["--data.prompts", "[Once", "upon", "a", "time]"],
         "upon: expected an option, such as --NAME VALUE (put a value with spaces or quotes in single quotes)"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_the_words_of_the_user(
    flags: list[str], words: str, in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("configs/lm").mkdir(parents=True)
    Path("configs/lm/demo.yaml").write_text("seed_everything: 1\n")
    Path("other.jsonl").write_text('{"x": "y"}\n')
    assert words in refused(capsys, "fit", *TINY, *flags)


def test_training_loss_at_the_end_is_the_mean_since_the_validation_before() -> None:
    rows = [{"step": step, "train/loss": loss} for step, loss in ((1, 9.0), (2, 5.0), (3, 3.0), (4, 1.0))]
    assert training_loss([]) == {} and training_loss(rows) == {"train/loss": 4.5}
    rows[3]["val/loss"] = 1.0
    assert training_loss(rows) == {"train/loss": 4.5}
    rows[1]["val/loss"] = 2.0
    assert training_loss(rows) == {"train/loss": 2.0}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_told_with_a_cure(pairs: str, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, *FIT, pairs, "--trainer.accelerator=gpu")
    assert said.endswith("leave configs/gpu.yaml out, or give --trainer.accelerator cpu")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["hugging_fac", "a", "b"], "hugging_fac: expected hugging_face, llama2c, gguf, adapter or import"),
        ([], "no command is given: expected hugging_face, llama2c, gguf, adapter or import; --help explains them"),
        (["hugging_face"], "checkpoint and folder: not given; --help explains them"),
        (["gguf", "a", "b", "--type", "q9"], "type q9: expected f32, f16 or q8_0"),
        (["gguf", "a", "b", "c", "d"], "c: expected an option, such as --NAME VALUE (put a"),
        (["hugging_face", "nowhere", "b"], "nowhere does not exist"),
        (["gguf", "mine/custom", "b"], "mine/custom is a run of classify: use "),
        (["adapter", "mine/custom", "b"], "mine/custom is a run of classify: use "),
    ],
)  # fmt: skip
def test_mistakes_of_a_conversion_are_told_in_one_line(
    args: list[str], words: str, in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    write_classifier(Path("mine/custom"))
    with pytest.raises(SystemExit, match="2"):
        convert(args)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_environment_variables_of_old_names_work_with_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    renamed._note.cache_clear()
    for name, value in (("BEGINNINGS", "true"), ("PACKING", "true"), ("EVALUATION", "report"), ("BATCH_SIZE", "5")):
        monkeypatch.setenv(f"TINYLAB_FIT__DATA__{name}", value)
    monkeypatch.setenv("TINYLAB_FIT__DATA__EXTRA_FIRST_WINDOWS", "true")  # so that it is put back
    monkeypatch.delenv("TINYLAB_FIT__DATA__EXTRA_FIRST_WINDOWS")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--data.path=demo", "--print_config"])
    told = capsys.readouterr()
    for line in ("extra_first_windows: true", "packing: true", "evaluation: first_window", "batch_size: 5"):
        assert line in told.out
    assert "note: data.beginnings is now data.extra_first_windows" in told.err
    assert "TINYLAB_FIT__DATA__BEGINNINGS" not in os.environ


def test_run_whose_best_is_what_it_began_with_says_so_and_names_the_last(
    pairs: str, capsys: pytest.CaptureFixture
) -> None:
    main([*FIT, pairs])
    capsys.readouterr()
    worse = ["--model.init_from=run", "--run_dir=worse", "--model.optimizer.learning_rate=1000"]
    main(["fit", *TINY, pairs, "--trainer.max_steps=5", "--data.sequence_length=32", *worse])
    said = capsys.readouterr().out
    assert "best.ckpt holds the initial weights" in " ".join(said.split())
    assert "--ckpt_path last" in said


@pytest.fixture(scope="module")
def folder_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run runs/demo/lm."""
    folder = tmp_path_factory.mktemp("messages")
    write_classifier(folder / "mine/custom")
    data = f"--data.path={write_stories(folder / 'stories')}"
    main(["fit", *TINY, data, "--trainer.max_steps=1", f"--run_dir={folder / 'runs/demo/lm'}"])
    return folder


USE = ["predict", "--config=runs/demo/lm/config.yaml", "--data.prompts=[a]"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fitt"], "'fitt' is not a command (did you mean fit?)"),
        ([*USE, "--ckpt_path=bst"], "ckpt_path bst: there is no file bst (did you mean best?)"),
        ([*USE, "--ckpt_path=runs/demo/lm/checkpoints/lst.ckpt"], "lst.ckpt (did you mean last.ckpt?)"),
        (["predict", "--config=runs/demo/lm"], "(did you mean runs/demo/lm/config.yaml?)"),
        (["predict", "--config=runs/lm/demo/config.yaml"], "does not exist (did you mean runs/demo/lm/config.yaml?)"),
        (["predict", "--run_dir=runs/lm/demo", "--ckpt_path=best"], "does not exist (did you mean runs/demo/lm?)"),
        (["predict", "--run_dir=nowhere", "--ckpt_path=best"], "does not exist (there are runs/demo/lm)"),
        (
            ["predict", "--run_dir=runs/demo", "--ckpt_path=best"],
            "no checkpoint (its runs are runs/demo/lm)",
        ),
        (
            [*USE, "--ckpt_path=runs/demo/lm"],
            "ckpt_path runs/demo/lm is the folder of a run: give --ckpt_path "
            "runs/demo/lm/checkpoints/best.ckpt, or --config runs/demo/lm/config.yaml --ckpt_path best",
        ),
        (
            [*USE, "--ckpt_path=best", '--data.prompts=["x"'],
            "the list does not end; expected a ] after the last prompt",
        ),
        ([*USE, "--ckpt_path=mine/custom"], "mine/custom is a run of classify: use "),
    ],
)
def test_names_that_are_near_or_there_are_told(
    args: list[str], words: str, folder_of_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder_of_runs)
    assert words in refused(capsys, *args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--config", "runs/demo/lm/config.yaml"], ["--ckpt_path=runs/demo/lm/checkpoints/best.ckpt"]]
)
def test_a_run_of_the_other_package_is_told_as_such(
    flags: list[str], folder_of_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder_of_runs)
    said = refused(capsys, "predict", *flags, "--data.texts=[a]", package="classify")
    assert said == f"error: runs/demo/lm is a run of lm: use {command('lm')} predict …"


@pytest.mark.parametrize(
    "config", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda config: f"{config.parent.name}/{config.name}"
)
def test_a_configuration_is_known_by_its_options(config: Path) -> None:
    found = package_of_configuration(yaml.safe_load(config.read_text()))
    either = config.parent.name == "comparisons" or config.name in ("full.yaml", "peft.yaml")  # options of both
    assert found == (None if either else config.parent.name)


@pytest.mark.parametrize(("package", "other"), [("lm", "classify"), ("classify", "lm")])
def test_a_configuration_of_the_other_package_is_told_as_such(
    package: str, other: str, in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(ROOT / f"configs/{other}/demo.yaml")
    said = refused(capsys, "fit", "--config", config, package=package)
    assert said == f"error: {config} is a configuration of {other}: use {command(other)} fit …"


def test_resume_on_other_data_is_noted(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("stories", "others"):
        write_stories(Path(name))
    run = ["fit", *TINY, "--run_dir=run", "--data.path"]
    main([*run, "stories", "--trainer.max_steps=2"])
    main([*run, "stories", "--trainer.max_steps=3", "--ckpt_path=last"])
    assert "was trained on" not in capsys.readouterr().out
    main([*run, "others", "--trainer.max_steps=4", "--ckpt_path=last"])
    assert "run was trained on data.path stories, and now goes on with others" in " ".join(
        capsys.readouterr().out.split()
    )


def test_option_with_one_dash_is_told_to_have_two(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    expected = "-config: options begin with two dashes; did you mean --config?"
    assert expected in refused(capsys, "fit", "-config", "demo.yaml")


def test_end_of_fit_names_the_best_step_if_it_came_before_the_last(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    write_stories(Path("stories"))
    flags = ["--trainer.max_steps=8", "--trainer.val_check_interval=2", "--model.optimizer.schedule=constant"]
    said = []
    for rate in ("1", "1e-3"):  # the loss rises, and falls
        main(["fit", *TINY, *flags, "--data.path=stories", f"--model.optimizer.learning_rate={rate}"])
        said.append("best.ckpt is of step" in capsys.readouterr().out)
    assert said == [True, False]
