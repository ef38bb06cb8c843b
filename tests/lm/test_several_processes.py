"""Two processes are one: the same losses, one folder, one voice; launched by torchrun, by SLURM or by Lightning."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiment.runs.reading import read_checkpoint
from lm.__main__ import main
from lm.convert import main as convert
from tests.processes import Commands
from tests.runs import STEPS, TINY, assert_same_run, free_port, newest_step, rows, torchrun, write_stories

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
    """A run over six validation stories, whose batches two processes cannot halve, with nothing cached yet."""
    monkeypatch.setenv("TINYLAB_CACHE", str(in_tmp / "cache"))
    return [f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--data.eval_batch_size=2"]


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


HOW = {
    "plain": ["--trainer.precision=32-true"],
    "compiled": ["--trainer.precision=32-true", "--model.compile=true", "--model.activation_checkpointing=true"],
    "bfloat16": ["--trainer.precision=bf16-mixed"],
}


@pytest.mark.parametrize("how", HOW)
def test_divided_weights_give_the_losses_samples_and_checkpoint_of_one_process(
    how: str, arguments: list[str], commands: Commands, request: pytest.FixtureRequest
) -> None:
    if how != "plain" and not request.config.getoption("thorough"):
        pytest.skip("takes half a minute: --thorough")
    near = 1e-3 if how == "bfloat16" else 1e-5
    same = [*arguments, *HOW[how], "--model.decoder.dropout=0", "--model.optimizer.schedule=constant",
            "--trainer.gradient_clip_val=1", "--samples.every_n_steps=2", "--samples.temperature=0",
            "--report=true"]  # fmt: skip
    both = ["fit", *FSDP, *same, "--data.batch_size=2", "--data.global_batch_tokens=128", "--run_dir=two"]
    for steps in (2, 5):  # resumed once
        first, second = commands.together(torchrun(), *both, f"--trainer.max_steps={steps}", "--ckpt_path=last")
        assert first.wait() == second.wait() == 0, first.output + second.output
        assert "each step trains 2 sequences x 16 tokens x 2 processes x 2 micro-batches = 128" in first.output
    commands.run("fit", *same, "--data.batch_size=8", "--trainer.max_steps=5", "--run_dir=one")
    for left, right in zip(rows(Path("one")), rows(Path("two")), strict=True):
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=near)
        if left["val/loss"]:
            assert float(left["val/loss"]) == pytest.approx(float(right["val/loss"]), abs=near)
    if how != "bfloat16":
        assert Path("two/samples.jsonl").read_text() == Path("one/samples.jsonl").read_text()
    assert Path("two/report.html").exists()
    alone, divided = (read_checkpoint(Path(run) / "checkpoints/last.ckpt", "all") for run in ("one", "two"))
    assert alone["state_dict"].keys() == divided["state_dict"].keys()
    for name, weight in alone["state_dict"].items():
        assert torch.allclose(weight, divided["state_dict"][name], atol=near), name
    moments = [content["optimizer_states"][0]["state"] for content in (alone, divided)]
    assert moments[0].keys() == moments[1].keys()
    for number, state in moments[0].items():
        assert torch.allclose(state["exp_avg"], moments[1][number]["exp_avg"], atol=near)


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


def test_two_nodes_that_torchrun_brings_together_give_the_losses_of_one_process(
    arguments: list[str], commands: Commands, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("thorough"):
        pytest.skip("starts four processes from nothing: --thorough")
    same = [*arguments, "--model.decoder.dropout=0", "--trainer.max_steps=6"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
             f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]  # fmt: skip
    command = [*agent, "-m", "lm", "fit", *DDP, *same, "--trainer.num_nodes=2", "--trainer.devices=1",
               "--data.batch_size=4"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    agents = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in agents:
        _, errors = one.communicate(timeout=200)
        assert one.returncode == 0, errors
    assert [path.name for path in Path("runs/lm").iterdir()] == ["ddp"]
    commands.run("fit", *same, "--data.batch_size=8", "--run_dir=one")
    for left, right in zip(rows(Path("one")), rows(Path("runs/lm/ddp")), strict=True):
        assert float(left["train/loss"]) == pytest.approx(float(right["train/loss"]), abs=1e-5)
