"""A run's folder: what is written into it, by whom, and that it is enough when copied or when its sources are gone."""

import json
import os
import shlex
import shutil
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from experiment.invocation import command
from experiment.runs import run as run_folder
from experiment.runs.provenance import STARTED, read_record
from experiment.runs.stopping import StopRequest
from lm.__main__ import main
from lm.data.bpe import train_tokenizer
from tests.runs import STORIES, TINY, assert_same_run, refused, rows, write_stories

SHORT = [*TINY, "--samples.every_n_steps=0", "--trainer.val_check_interval=3"]


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return [f"--data.path={write_stories(in_tmp / 'stories')}", *SHORT]


def content(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_run_whose_link_was_lost_goes_on_from_its_newest_checkpoint(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    main(["fit", *arguments, "--run_dir=whole", "--trainer.max_steps=9"])
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=6", "--checkpoint.keep=-1"])
    Path("run/checkpoints/last.ckpt").unlink()
    for words in (["validate"], ["predict", "--data.prompts=[Tom]"]):
        main([*words, "--config=run/config.yaml", "--ckpt_path=last"])
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=9", "--ckpt_path=last"])
    assert "resuming from run/checkpoints/step-000006.ckpt" in capsys.readouterr().out
    assert_same_run(Path("run"), Path("whole"), 9)


def test_run_json_knows_steps_and_time_of_calls_that_were_stopped_or_killed(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["fit", *arguments, "--run_dir=run", "--trainer.max_steps=7"]
    begun = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agreed", lambda self, trainer: signal.SIGINT * (trainer.global_step == 3))
        with pytest.raises(SystemExit, match="130"):
            main(arguments)
    assert capsys.readouterr().out.endswith(f"{command('lm')} {shlex.join(arguments)} --ckpt_path last\n")
    (call,) = read_record(Path("run"))["calls"]
    assert (call["from_step"], call["to_step"]) == (0, 3) and 0 <= call["seconds"] <= time.time() - begun + 0.1
    del call["to_step"], call["seconds"]  # as a kill leaves it
    Path("run/run.json").write_text(json.dumps({"calls": [call]}))
    last_written = datetime.strptime(call["started"], STARTED).timestamp() + 90
    os.utime("run/metrics.csv", (last_written, last_written))
    main([*arguments, "--ckpt_path=last"])
    calls = read_record(Path("run"))["calls"]
    assert [(call["from_step"], call["to_step"]) for call in calls] == [(0, 3), (3, 7)]
    assert calls[0]["seconds"] == 90 and 0 <= calls[1]["seconds"] <= time.time() - begun + 0.1


def test_a_caller_may_have_a_command_of_its_own_that_resumes(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLAB_RESUME", "make demo")
    monkeypatch.setattr(StopRequest, "agreed", lambda self, trainer: signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        main(["fit", *arguments, "--run_dir=run"])
    assert capsys.readouterr().out.endswith("stopped; resume with\n  make demo\n")


def test_interrupted_repetition_of_a_run_is_resumed_in_its_own_folder(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fit", *arguments, "--run_dir=runs/lm/first"])
    monkeypatch.setattr(StopRequest, "agreed", lambda self, trainer: signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        main(["fit", "--config=runs/lm/first/config.yaml"])
    expected = "fit --config=runs/lm/first/config.yaml --run_dir runs/lm/first-2 --ckpt_path last\n"
    assert capsys.readouterr().out.endswith(expected)
    monkeypatch.chdir("runs/lm/first")
    with pytest.raises(SystemExit, match="130"):
        main(["fit", "--config=config.yaml"])
    assert capsys.readouterr().out.endswith("first-3 --ckpt_path last\n")


def test_damaged_newest_checkpoint_is_passed_over_for_the_one_before(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=7", "--checkpoint.keep=-1"])
    folder = Path("run/checkpoints")
    (folder / "last.ckpt").unlink()
    for damaged in ("step-000007.ckpt", "best.ckpt"):
        (folder / damaged).write_bytes((folder / damaged).read_bytes()[:5000])
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=9", "--ckpt_path=last"])
    assert "resuming from run/checkpoints/step-000006.ckpt" in capsys.readouterr().out
    for file in folder.glob("*.ckpt"):
        file.unlink()
        file.write_bytes(b"cut")
    (folder / "last.ckpt").unlink()
    before = content(Path("run"))
    assert "step-000009.ckpt" in refused(capsys, "fit", *arguments, "--run_dir=run", "--ckpt_path=last")
    assert content(Path("run")) == before


def test_last_is_a_copy_where_the_file_system_has_no_links(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(self: Path, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")  # as exFAT says

    monkeypatch.setattr(Path, "symlink_to", no_links)
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=6"])
    last = Path("run/checkpoints/last.ckpt")
    assert not last.is_symlink() and last.read_bytes() == Path("run/checkpoints/step-000006.ckpt").read_bytes()
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=9", "--ckpt_path=last"])
    assert torch.load(last, weights_only=True)["global_step"] == 9


def test_configuration_called_config_yaml_is_no_run(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    for folder in (Path(), Path("exp")):
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text("seed_everything: 7\n")
    main(["fit", "--config=exp/config.yaml", *arguments, "--trainer.max_steps=1"])
    main(["fit", "--config=config.yaml", *arguments, "--trainer.max_steps=1"])
    main(["validate", "--config=config.yaml", *arguments, "--ckpt_path=last"])
    assert {path.name for path in Path("runs/lm").iterdir()} == {"exp", Path.cwd().name}
    error = refused(capsys, "fit", "--config=exp/config.yaml", *arguments, "--run_dir=exp", "--ckpt_path=last")
    assert "config.yaml not written by fit" in error
    assert Path("exp/config.yaml").read_text() == "seed_everything: 7\n"


def test_run_in_the_working_directory_is_repeated_beside_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=1"])
    monkeypatch.chdir("run")
    main(["fit", "--config=config.yaml"])
    assert rows(Path("../run-2")) == rows(Path())


def test_two_trainings_never_write_into_one_folder(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=1"])
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.1)
    before = content(Path("run"))
    with FileLock("run/.lock"):
        error = refused(capsys, "fit", *arguments, "--run_dir=run", "--ckpt_path=last")
        main(["predict", "--config=run/config.yaml", "--ckpt_path=last", "--data.prompts=[Tom]"])
    assert "in use by another training" in error
    assert {path: data for path, data in content(Path("run")).items() if path in before} == before
    main(["fit", *arguments, "--run_dir=run", "--ckpt_path=last", "--trainer.max_steps=2"])


def test_seed_that_is_drawn_is_written_down_and_repeats_the_run(arguments: list[str]) -> None:
    for name in ("a", "b"):
        main(["fit", *arguments, f"--run_dir={name}", "--trainer.max_steps=2", "--seed_everything=true"])
    seeds = [yaml.safe_load(Path(name, "config.yaml").read_text())["seed_everything"] for name in ("a", "b")]
    assert seeds[0] != seeds[1] and True not in seeds
    main(["fit", "--config=a/config.yaml", "--run_dir=again"])
    assert_same_run(Path("again"), Path("a"), 2)
    assert rows(Path("b"))[1]["train/loss"] != rows(Path("a"))[1]["train/loss"]


def test_seed_out_of_range_is_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    for seed in ("-1", str(2**32)):
        assert f"seed_everything {seed}: expected 0 to" in refused(
            capsys, "fit", *arguments, f"--seed_everything={seed}"
        )


def test_run_uses_its_own_tokenizer_where_the_source_is_gone(arguments: list[str]) -> None:
    train_tokenizer(STORIES, 345).save("bought")
    flags = [*arguments, "--data.tokenizer=bought"]
    main(["fit", *flags, "--run_dir=whole", "--trainer.max_steps=6"])
    main(["fit", *flags, "--run_dir=run", "--trainer.max_steps=3"])
    shutil.move("run", "moved")
    shutil.rmtree("bought")
    config = ["--config=moved/config.yaml", "--ckpt_path=last"]
    main(["validate", *config])
    main(["predict", *config, "--data.prompts=[Tom]"])
    main(["fit", *config, "--trainer.max_steps=6"])
    assert_same_run(Path("moved"), Path("whole"), 6)
    assert Path("moved/config.yaml").read_text() == Path("whole/config.yaml").read_text()


def test_imported_run_is_used_after_it_was_moved(arguments: list[str]) -> None:
    from lm.convert import main as convert

    main(["fit", *arguments, "--run_dir=run", "--trainer.max_steps=1"])
    convert(["hugging_face", "run/checkpoints/last.ckpt", "exported"])
    convert(["import", "exported", "imported", "--path=stories"])
    shutil.move("imported", "moved")
    main(["predict", "--config=moved/config.yaml", "--ckpt_path=last", "--data.prompts=[Tom]"])
    main(["fit", "--config=moved/config.yaml", "--ckpt_path=moved/checkpoints/last.ckpt", "--run_dir=tuned", *SHORT,
          "--trainer.max_steps=1"])  # fmt: skip


def test_repeating_a_wandb_run_writes_into_its_own_folder(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = str(Path(__file__).parents[2] / "configs/wandb.yaml")
    main(["fit", *arguments, f"--config={wandb}", "--run_dir=w1", "--trainer.max_steps=1"])
    main(["fit", "--config=w1/config.yaml", "--run_dir=w2"])
    assert len(list(Path("w1/wandb").glob("offline-run-*"))) == len(list(Path("w2/wandb").glob("offline-run-*"))) == 1
    options = yaml.safe_load(Path("w1/config.yaml").read_text())["trainer"]["logger"]["init_args"]
    assert options["save_dir"] is options["name"] is options["offline"] is None


def test_wandb_online_without_a_login_is_refused_before_anything_is_written(
    arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, in_tmp: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(in_tmp / "netrc"))
    logger = ["--trainer.logger=experiment.pages.wandb_logger.WandbLogger", "--trainer.logger.offline=false"]
    error = refused(capsys, "fit", *arguments, "--run_dir=run", *logger)
    assert "wandb login" in error and not Path("run").exists()


def test_wandb_sees_a_login_at_a_private_server(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    import wandb

    from experiment.pages.wandb_logger import WandbLogger

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(in_tmp / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    key = "0123456789" * 4
    for machine, offline in (("api.wandb.ai", True), ("wandb.example.org", False)):
        Path("netrc").write_text(f"machine {machine}\n  login user\n  password {key}\n")
        wandb.teardown()  # what it has read of the environment
        logger = WandbLogger()
        logger.check()
        assert logger.mode == ("offline" if offline else "online")
    wandb.teardown()
