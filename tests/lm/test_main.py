"""The language model's command line, end to end in process: every configuration, every kind of bad input."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lm.__main__ import main
from lm.data.bpe import train_tokenizer
from tests.runs import STORIES, refused, write_stories

CONFIGS = Path(__file__).parents[2] / "configs"
SHRUNK = {
    "data": {"vocab_size": 345, "sequence_length": 16, "batch_size": 4},
    "model.decoder": {
        "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "max_sequence_length": 32
    },
    "model.generation": {"max_new_tokens": 8},
    "model": {"compile": False},  # which has tests of its own, and takes long
    "trainer": {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1},
    "checkpoint": {"every_n_steps": 2},
    "samples": {"every_n_steps": 2, "max_new_tokens": 4},
}  # fmt: skip
SMALL = [f"--{group}.{name}={value}" for group, values in SHRUNK.items() for name, value in values.items()]


@pytest.fixture
def stories(in_tmp: Path) -> Path:
    """A folder with a small corpus, in an empty working directory."""
    return write_stories(in_tmp / "stories")


@pytest.fixture(scope="module")
def run_of_four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_stories(Path("stories"))
        main(["fit", "--data.path=stories", "--run_dir=run", *SMALL])
    return folder / "run"


@pytest.fixture
def trained(stories: Path, run_of_four_steps: Path) -> Path:
    """A run of four steps on that corpus."""
    return Path(shutil.copytree(run_of_four_steps, "run", symlinks=True))


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


COMPILE = "--model.compile=true"
MUON = "--model.optimizer.muon_learning_rate=0.02"


@pytest.mark.parametrize("config", sorted((CONFIGS / "lm").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_fits_validates_tests_and_predicts(config: Path, stories: Path) -> None:
    small = [*SMALL, "--data.global_batch_tokens=null"]
    if "init_from" in yaml.safe_load(config.read_text())["model"]:  # which brings its own shape and tokenizer
        main(["fit", f"--data.path={stories}", "--run_dir=start", *SMALL])
        of_the_start = ("--model.decoder.", "--data.vocab_size")
        small = [flag for flag in small if not flag.startswith(of_the_start)]
        small += ["--model.init_from=start", "--data.second_path=null"]
    main(["fit", "--config", str(config), f"--data.path={stories}", *small])
    run = Path("runs/lm") / config.stem
    for command in ("validate", "test", "predict"):
        prompts = ["--data.prompts=[Once upon, Tom]"] if command == "predict" else []
        main([command, "--config", str(run / "config.yaml"), "--ckpt_path=best", *prompts])
    stories_written = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [story["prompt"] for story in stories_written] == ["Once upon", "Tom"]
    assert all(story["text"].startswith(story["prompt"]) for story in stories_written)
    before = ["0"] if "--model.init_from=start" in small else []  # validated before the first step
    assert [row["step"] for row in rows(run)] == [*before, "1", "2", "3", "4"]
    written = {"step-000004.ckpt", "last.ckpt", "best.ckpt"} | ({"base.pt"} if before else set())
    assert {path.name for path in (run / "checkpoints").iterdir()} == written
    assert {json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()} == {2, 4}


def test_keys_of_every_configuration_carry_a_comment() -> None:
    for config in CONFIGS.rglob("*.yaml"):
        text, _, _ = config.read_text().partition("\nrows:")  # a comparison's rows say what they show
        for line in text.splitlines():
            key, _, rest = line.partition(":")
            is_section = not rest.strip() or key.strip() == "class_path"
            assert "#" in line or is_section or not line.strip(), f"{config.name}: {line}"


@pytest.mark.parametrize("overlay", ["ddp", "gpu", "tensorboard", "wandb"])
def test_overlay_changes_only_what_it_names(overlay: str, stories: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["fit", "--config", str(CONFIGS / "lm/demo.yaml"), "--config", str(CONFIGS / f"{overlay}.yaml")]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load((CONFIGS / f"{overlay}.yaml").read_text())["trainer"]
    for key, value in wanted.items():
        if isinstance(value, dict):
            assert printed["trainer"][key]["class_path"] == value["class_path"]
        else:
            assert printed["trainer"][key] == value
    assert printed["data"]["path"] == "demo"


def test_perplexity_is_exp_of_the_loss_and_validate_repeats_the_figures_of_fit(trained: Path) -> None:
    last = rows(trained)[-1]
    assert float(last["val/perplexity"]) == pytest.approx(math.exp(float(last["val/loss"])), rel=1e-6)
    cli = main(["validate", "--config=run/config.yaml", "--ckpt_path=last"])
    for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
        assert float(cli.trainer.callback_metrics[name]) == pytest.approx(float(last[name]), rel=1e-6)


def test_trained_model_predicts_where_its_corpus_is_gone(trained: Path, stories: Path) -> None:
    shutil.rmtree(stories)
    main(["predict", "--config=run/config.yaml", "--ckpt_path=best", "--data.prompts=[Tom]"])
    assert json.loads((trained / "predictions.jsonl").read_text())["prompt"] == "Tom"


def test_flag_given_by_hand_wins_over_config_and_checkpoint(trained: Path, stories: Path) -> None:
    flags = ["--config=run/config.yaml", "--ckpt_path=run/checkpoints/last.ckpt"]
    cli = main(["validate", *flags, "--model.optimizer.learning_rate=0.5", "--data.sequence_length=8"])
    assert cli.model.optimizer_config.learning_rate == 0.5
    assert cli.datamodule.sequence_length == 8


def test_context_is_as_long_as_the_training_sequences_and_stays_with_the_checkpoint(stories: Path) -> None:
    given = [flag for flag in SMALL if "max_sequence_length" not in flag]
    given += [f"--data.path={stories}", "--run_dir=run", "--samples.prompts=[Tom]"]
    assert main(["fit", *given]).model.decoder.config.max_sequence_length == 16
    shorter = main(["validate", *given, "--ckpt_path=last", "--data.sequence_length=8"])
    assert (shorter.datamodule.sequence_length, shorter.model.decoder.config.max_sequence_length) == (8, 16)
    assert main(["validate", "--config=run/config.yaml"]).model.decoder.config.max_sequence_length == 16


def test_config_of_a_run_repeats_it_to_the_bit(trained: Path) -> None:
    main(["fit", "--config=run/config.yaml"])
    again = Path("run-2")
    assert (again / "config.yaml").read_text() == (trained / "config.yaml").read_text()
    assert [row["train/loss"] for row in rows(again)] == [row["train/loss"] for row in rows(trained)]


def test_another_optimizer_than_the_checkpoint_has_the_state_of_is_refused_and_changes_nothing(
    trained: Path, stories: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    arguments = [f"--data.path={stories}", "--run_dir=run", *SMALL, "--trainer.max_steps=8", "--ckpt_path=last"]
    error = refused(capsys, "fit", *arguments, MUON)
    assert "muon_learning_rate 0.02" in error and "without Muon" in error
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_same_seed_gives_the_same_losses_and_another_seed_others(stories: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(["fit", f"--data.path={stories}", f"--run_dir={name}", f"--seed_everything={seed}", *SMALL])
        losses.append([row["train/loss"] for row in rows(Path(name))])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_resumed_run_equals_the_uninterrupted_one(stories: Path) -> None:
    arguments = [f"--data.path={stories}", *SMALL, "--model.decoder.dropout=0", "--model.optimizer.schedule=constant"]
    main(["fit", *arguments, "--run_dir=whole", "--trainer.max_steps=9"])
    main(["fit", *arguments, "--run_dir=parts", "--trainer.max_steps=6"])
    main(["fit", *arguments, "--run_dir=parts", "--trainer.max_steps=9", "--ckpt_path=last"])
    names = ("step", "train/loss", "train/learning_rate", "train/tokens", "val/loss")
    assert [[row[name] for name in names] for row in rows(Path("parts"))] == [
        [row[name] for name in names] for row in rows(Path("whole"))
    ]
    weights = [
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "parts")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_flag_wins_wherever_it_stands_and_over_the_environment(
    stories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TINYLAB_FIT__MODEL__OPTIMIZER__LEARNING_RATE", "0.25")
    monkeypatch.setenv("TINYLAB_FIT__DATA__BATCH_SIZE", "7")
    config = CONFIGS / "lm/demo.yaml"
    with pytest.raises(SystemExit):
        main(["fit", "--model.optimizer.learning_rate=0.5", f"--config={config}", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["optimizer"]["learning_rate"] == 0.5
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["batch_size"] == 7


def test_bfloat16_trains_with_clipped_gradients(stories: Path) -> None:
    precision = ["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=0.1"]
    main(["fit", f"--data.path={stories}", "--run_dir=run", *SMALL, *precision])
    losses = [float(row["train/loss"]) for row in rows(Path("run"))]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)


def test_prompt_past_the_context_is_continued_with_a_sliding_window(trained: Path) -> None:
    prompt = "Once upon a time, Tom had a red ball. " * 5
    main(["predict", "--config=run/config.yaml", "--ckpt_path=last", f'--data.prompts=["{prompt}"]',
          "--model.generation.sliding_window=true"])  # fmt: skip
    assert json.loads((trained / "predictions.jsonl").read_text())["tokens"] == 8


def test_predictions_of_a_run_on_two_processes_are_written_by_one(trained: Path) -> None:
    main(["predict", "--config=run/config.yaml", "--ckpt_path=last", "--data.prompts=[Tom, Ben]",
          "--trainer.devices=2", "--trainer.strategy=ddp"])  # fmt: skip
    assert len((trained / "predictions.jsonl").read_text().splitlines()) == 2


def test_empty_prompt_gives_a_story_from_its_beginning(trained: Path) -> None:
    main(["predict", "--config=run/config.yaml", "--ckpt_path=last", '--data.prompts=[""]'])
    story = json.loads((trained / "predictions.jsonl").read_text())
    assert story["prompt"] == "" and story["tokens"] > 0


def test_text_may_hold_markup_and_special_token_strings(trained: Path) -> None:
    Path("prompts.txt").write_text("[bold]Tom[/nothing] </s> <unk>\n")
    main(["predict", "--config=run/config.yaml", "--ckpt_path=last", "--data.prompts=prompts.txt",
          "--model.decoder.max_sequence_length=200"])  # fmt: skip
    story = json.loads((trained / "predictions.jsonl").read_text())
    assert story["text"].startswith("[bold]Tom[/nothing] </s> <unk>")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.path=./nowhere"], ["nowhere", "does not exist"]),
        (["--data.path=nobody/no-such-data"], ["nobody/no-such-data", "Hub"]),
        (["--data.path=empty.jsonl"], ["empty.jsonl", "is empty"]),
        (["--data.path=column.jsonl"], ["column.jsonl", "no column 'text'", "story"]),
        (["--data.tokenizer=stories/train.jsonl"], ["train.jsonl", "tokenizer"]),
        (["--data.tokenizer=no/such/tokenizer"], ["no/such/tokenizer", "does not exist"]),
        (["--data.path=./nowhere", "--data.tokenizer=ready"], ["nowhere", "does not exist"]),
        (["--data.path=column.jsonl", "--data.tokenizer=ready"], ["column.jsonl", "no column 'text'"]),
        (["--data.path=blank.jsonl", "--data.tokenizer=ready"], ["blank.jsonl", "empty"]),
        (["--trainer.accelerator=gpu", "--trainer.devices=1"], ["trainer", "gpu"]),
        (["--samples.prompts=[" + "Once upon a time " * 9 + "]"], ["samples.prompts", "context of 32"]),
        (["--data.sequence_length=64"], ["sequence_length 64", "max_sequence_length 32"]),
        (["--data.batch_size=0"], ["batch_size", "0"]),
        (["--model.decoder.num_heads=3"], ["num_heads=3", "hidden_size=16"]),
        (["--model.generation.temperature=-1"], ["temperature=-1", "expected"]),
        (["--model.optimizer.learning_rate=0"], ["learning_rate 0"]),
        (["--model.optimizer.schedule=linear"], ["linear", "cosine"]),
        (["--model.generation.weight_dtype=int4"], ["weight_dtype int4", "expected float32, bfloat16, int8 or null"]),
        (["--data.batch_size=2.5"], ["data.batch_size 2.5", "expected a whole number"]),
        (["--model.decoder.hiden_size=3"], ["hiden_size", "did you mean --model.decoder.hidden_size?"]),
        (["--trainer.callbacks=EarlyStoping"], ["trainer.callbacks", "EarlyStoping", "Callback"]),
        (["--config=mistyped.yaml"], ["data.batch_sise", "did you mean data.batch_size?"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml"]),
        ([MUON, f"--config={CONFIGS / 'fsdp.yaml'}"], ["muon_learning_rate 0.02", "configs/ddp.yaml"]),
        (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], ["schedule cosine", "--trainer.max_steps"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt"]),
        (["--trainer.max_steps=many"], ["many"]),
    ],
    ids=lambda value: value[0].partition("=")[2][:24] if isinstance(value, list) else None,
)
def test_bad_input_of_fit_is_refused_and_writes_nothing(
    flags: list[str], words: list[str], stories: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("empty.jsonl").write_text("")
    Path("mistyped.yaml").write_text("data: {batch_sise: 3}")
    Path("column.jsonl").write_text('{"story": "x"}\n')
    Path("blank.jsonl").write_text('{"text": " "}\n' * 3)
    train_tokenizer(STORIES, 345).save("ready")
    error = refused(capsys, "fit", f"--data.path={stories}", "--run_dir=run", *SMALL, *flags)
    assert all(word in error for word in words), error
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.prompts=[" + "Once upon a time " * 20 + "]"], ["prompt", "tokens", "context"]),
        (["--data.prompts=nowhere.txt"], ["nowhere.txt"]),
        (["--data.prompts=[]"], ["prompts"]),
        (["--data.prompts=blank.txt"], ["blank.txt", "is empty"]),
        (["--model.generation.temperature=-0.5", "--data.prompts=[Tom]"], ["temperature=-0.5"]),
        (["--ckpt_path=cut.ckpt", "--data.prompts=[Tom]"], ["cut.ckpt", "truncated"]),
        (["--ckpt_path=other.ckpt", "--data.prompts=[Tom]"], ["other.ckpt", "another architecture"]),
        (["--ckpt_path=text.ckpt", "--data.prompts=[Tom]"], ["text.ckpt"]),
    ],
    ids=["long-prompt", "no-file", "no-prompt", "blank-file", "temperature", "truncated", "architecture", "text"],
)
def test_bad_input_of_predict_is_refused_and_writes_nothing(
    flags: list[str], words: list[str], trained: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = (trained / "checkpoints/last.ckpt").read_bytes()
    Path("cut.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("text.ckpt").write_text("hello")
    Path("blank.txt").write_text(" \n\n")
    checkpoint = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["decoder.norm.weight"] = torch.ones(7)
    torch.save(checkpoint, "other.ckpt")
    error = refused(capsys, "predict", "--config=run/config.yaml", "--ckpt_path=last", *flags)
    assert all(word in error for word in words), error
    assert not list(trained.glob("predictions*"))


def test_predict_without_a_checkpoint_is_refused(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--ckpt_path" in refused(capsys, "predict", "--config=run/config.yaml", "--data.prompts=[Tom]")


def test_second_fit_into_the_same_folder_is_refused_and_harms_nothing(
    trained: Path, stories: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    error = refused(capsys, "fit", f"--data.path={stories}", "--run_dir=run", *SMALL)
    assert "already holds a run" in error
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
