"""A model that outgrows the memory of a process trains in two, survives a kill, and is read by transformers."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm import convert
from tests.lm.test_several_processes import FSDP
from tests.processes import Commands, Process
from tests.runs import TINY, rows, torchrun, write_stories

MIB = 1 << 20
LARGE = ["--model.decoder.hidden_size=1024", "--model.decoder.intermediate_size=2730", "--model.decoder.num_layers=12",
         "--model.decoder.num_heads=8"]  # fmt: skip
LIMIT = 2112 * MIB  # of writable memory of its own, as ulimit -d sets it
SECONDS = 400  # for a run


def to_the_end(processes: list[Process]) -> str:
    """Wait for all; the MiB of data and of resident memory that each took at most."""
    peaks = {"VmData": [0] * len(processes), "VmHWM": [0] * len(processes)}

    def look() -> bool:
        for kind, found in peaks.items():
            for place, process in enumerate(processes):
                found[place] = max(found[place], process.memory(kind) // MIB)
        return False

    for process in processes:
        process.wait(until=look, seconds=SECONDS)
    return str(peaks)


def test_a_model_larger_than_the_memory_of_a_process_trains_in_two_is_killed_resumes_and_is_exported(
    in_tmp: Path, commands: Commands, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    if not request.config.getoption("thorough"):
        pytest.skip("takes minutes: --thorough")
    same = ["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, *LARGE, "--data.batch_size=1",
            "--trainer.max_steps=3", "--trainer.val_check_interval=100", "--samples.every_n_steps=0",
            "--checkpoint.every_n_steps=2", "--model.decoder.dropout=0", "--trainer.precision=32-true"]  # fmt: skip

    def start(run: str) -> list[Process]:
        args = [*same, *FSDP, f"--run_dir={run}", "--ckpt_path=last"]
        return [commands.start(*args, env=env, memory=LIMIT) for env in torchrun()]

    alone = [commands.start(*same, "--run_dir=one", memory=LIMIT)]
    peaks = {"one process": to_the_end(alone)}
    assert alone[0].poll() != 0 and "memory" in alone[0].output and not rows(Path("one"))

    whole = start("whole")
    peaks["two processes"] = to_the_end(whole)
    assert [process.poll() for process in whole] == [0, 0], whole[0].output
    expected = rows(Path("whole"))
    shutil.rmtree("whole")
    killed = start("two")
    killed[0].wait(until=Path("two/checkpoints/last.ckpt").exists, seconds=SECONDS)
    for process in killed:
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    resumed = start("two")
    peaks["resumed"] = to_the_end(resumed)
    assert [process.poll() for process in resumed] == [0, 0], resumed[0].output
    assert [row["step"] for row in expected] == ["1", "2", "3"]
    assert rows(Path("two")) == expected

    checkpoint = Path("two/checkpoints/last.ckpt")
    assert checkpoint.is_dir()
    convert.hugging_face(str(checkpoint), "exported")
    decoder, _ = convert.load_checkpoint(checkpoint)
    size = sum(weight.numel() for weight in decoder.parameters())
    assert 16 * size > LIMIT  # weights, gradients, and AdamW's two states of each, in float32
    ids = torch.arange(12)[None]
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained("exported")(ids).logits
        assert torch.allclose(decoder(ids), exported, atol=1e-4)
    for folder in ("two", "exported"):  # pytest would keep these gigabytes
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n  {size / 1e6:.0f} M parameters, {16 * size // MIB} MiB; limit {LIMIT // MIB} MiB of data")
        for name, found in peaks.items():
            print(f"  {name:<13} {found}")
