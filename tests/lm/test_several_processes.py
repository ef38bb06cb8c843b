"""Two processes are one: the same losses, one folder, one voice; launched by torchrun, by SLURM or by Lightning."""

import signal
from pathlib import Path

import pytest
import torch

from lm.__main__ import main
from lm.convert import main as convert
from tests.processes import Commands
from tests.runs import STEPS, TINY, assert_same_run, checkpoint, free_port, newest_step, rows, torchrun, write_stories

CONFIGS = Path(__file__).parents[2] / "configs"
DDP = ["--config", str(CONFIGS / "ddp.yaml")]
FSDP = ["--config", str(CONFIGS / "fsdp.yaml")]


def slurm() -> list[dict[str, str]]:
    """What srun sets for two tasks on one node."""
    shared = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "tinylab",
        "SLURM_STEP_ID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]


@pytest.fixture
def arguments(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run over a validation split of seven stories, which two processes cannot halve, with nothing cached yet."""
    monkeypatch.setenv("TINYLAB_CACHE", str(in_tmp / "cache"))
    return [f"--data.path={write_stories(in_tmp / 'stories', 7)}", *TINY, "--data.eval_batch_size=2"]


@pytest.mark.parametrize("launcher", [torchrun, slurm], ids=lambda launcher: launcher.__name__)
def test_two_processes_give_the_losses_of_one_with_the_same_global_batch(
    launcher, arguments: list[str], commands: Commands
) -> None:
    same = [*arguments, "--model.decoder.dropout=0", "--trainer.max_steps=10"]
    first, second = commands.together(launcher(), "fit", *DDP, *same, "--data.batch_size=4")
    assert first.wait() == second.wait() == 0, first.output + second.output
    # By the names that torchrun or SLURM left them, they agreed on one folder; one alone has spoken and tokenised.
    assert [path.name for path in Path("runs/lm").iterdir()] == ["ddp"]
    assert "finished after 10 steps" in first.output
    assert second.output == ""
    assert len(list(Path("cache/tokens").glob("*/tokens.bin"))) == 2
    commands.run("fit", *same, "--data.batch_size=8", "--run_dir=one")
    alone, together = rows(Path("one")), rows(Path("runs/lm/ddp"))
    assert len(alone) == len(together) == 10
    for left, right in zip(alone, together, strict=True):
        assert left["train/tokens"] == right["train/tokens"]
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=1e-5)
        if left["val/loss"]:
            assert float(left["val/loss"]) == pytest.approx(float(right["val/loss"]), abs=1e-6)


def test_within_a_slurm_job_a_command_that_srun_has_not_started_is_one_process(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "x")
    for procid in (None, "0"):  # a shell of salloc; the script of sbatch
        if procid is not None:
            monkeypatch.setenv("SLURM_PROCID", procid)
        cli = main(["fit", *arguments, "--trainer.max_steps=1", f"--run_dir=run-{procid}"])
        assert cli.trainer.world_size == 1
    main(["predict", "--config=run-0/config.yaml", "--ckpt_path=last", "--data.prompts=[Tom]"])
    convert(["hugging_face", "run-0/checkpoints/last.ckpt", "exported"])
    convert(["import", "exported", "imported", "--path=stories"])


def test_divided_weights_give_the_losses_and_the_checkpoint_of_one_process(
    arguments: list[str], commands: Commands
) -> None:
    same = [*arguments, "--model.decoder.dropout=0", "--model.optimizer.schedule=constant",
            "--trainer.gradient_clip_val=1"]  # fmt: skip
    both = ["fit", *FSDP, *same, "--samples.every_n_steps=0", "--data.batch_size=4", "--run_dir=two"]
    for steps in (3, 6):  # resumed once
        for process in commands.together(torchrun(), *both, f"--trainer.max_steps={steps}", "--ckpt_path=last"):
            assert process.wait() == 0, process.output
    commands.run("fit", *same, "--data.batch_size=8", "--trainer.max_steps=6", "--run_dir=one")
    for left, right in zip(rows(Path("one")), rows(Path("two")), strict=True):
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=1e-5)
    alone, divided = (checkpoint(Path(run))["state_dict"] for run in ("one", "two"))
    assert alone.keys() == divided.keys()
    for name, weight in alone.items():
        assert torch.allclose(weight, divided[name], atol=1e-5), name


def test_two_processes_stop_together_when_one_is_told_to_and_resume_to_the_bit(
    arguments: list[str], commands: Commands
) -> None:
    both = ["fit", *DDP, *arguments]
    for process in commands.together(torchrun(), *both, "--run_dir=whole"):
        assert process.wait() == 0, process.output
    first, second = [commands.start(*both, "--run_dir=run", env=env) for env in torchrun()]
    first.wait(until=lambda: newest_step(Path("run")) >= 7)
    first.send(signal.SIGTERM)
    assert first.wait() == second.wait() == 128 + signal.SIGTERM, first.output + second.output
    assert 7 <= newest_step(Path("run")) < STEPS
    for process in commands.together(torchrun(), *both, "--run_dir=run", "--ckpt_path=last"):
        assert process.wait() == 0, process.output
    assert_same_run(Path("run"), Path("whole"))


def test_lightning_launches_the_second_process_itself(arguments: list[str], commands: Commands) -> None:
    process = commands.run("fit", *DDP, *arguments, "--trainer.max_steps=4")
    assert [path.name for path in Path("runs/lm").iterdir()] == ["ddp"]
    assert len(rows(Path("runs/lm/ddp"))) == 4
    assert process.output.count("finished after 4 steps") == 1


def test_fewer_validation_stories_than_processes_are_refused(in_tmp: Path, commands: Commands) -> None:
    stories = write_stories(in_tmp / "stories", 1)
    processes = commands.together(
        torchrun(), "fit", *DDP, f"--data.path={stories}", *TINY, "--run_dir=run", "--data.evaluation=report"
    )
    for process in processes:
        assert process.wait() != 0
        assert "fewer than the 2 processes" in process.output and "Traceback" not in process.output
