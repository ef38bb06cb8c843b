"""A run whose weights are divided survives a kill, and leaves as a file for transformers."""

import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm import convert
from tests.lm.test_several_processes import FSDP
from tests.processes import Commands, Process
from tests.runs import TINY, newest_step, rows, torchrun, write_stories

MIB = 1 << 20
LARGE = ["--model.decoder.hidden_size=256", "--model.decoder.intermediate_size=768", "--model.decoder.num_layers=6",
         "--model.decoder.num_heads=8"]  # fmt: skip


def to_the_end(processes: list[Process]) -> dict[str, list[float]]:
    """Wait for all; the MiB of address space and of memory that each took at most."""
    peaks = {"VmPeak": [0.0] * len(processes), "VmHWM": [0.0] * len(processes)}

    def look() -> bool:
        for kind, found in peaks.items():
            for place, process in enumerate(processes):
                found[place] = max(found[place], process.peak(kind) / MIB)
        return False

    for process in processes:
        assert process.wait(until=look, seconds=300) == 0, process.output
    return peaks


def test_a_divided_run_that_is_killed_resumes_to_the_same_losses_and_is_exported(
    in_tmp: Path, commands: Commands, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    if not request.config.getoption("thorough"):
        pytest.skip("takes minutes: --thorough")
    same = ["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--trainer.max_steps=5",
            "--samples.every_n_steps=0", "--checkpoint.every_n_steps=3", "--model.decoder.dropout=0",
            "--trainer.precision=32-true"]  # fmt: skip
    same += LARGE

    def start(run: str) -> list[Process]:
        args = [*same, *FSDP, "--trainer.strategy.init_args.timeout=0:02:00", f"--run_dir={run}", "--ckpt_path=last"]
        return [commands.start(*args, env=env) for env in torchrun()]

    alone = to_the_end([commands.start(*same, "--run_dir=one")])
    whole = to_the_end(start("whole"))
    killed = start("two")
    killed[0].wait(until=lambda: newest_step(Path("two")) >= 4, seconds=300)
    for process in killed:
        process.send(signal.SIGKILL)
        process.wait()
    resumed = to_the_end(start("two"))
    assert [row["step"] for row in rows(Path("two"))] == [str(step) for step in range(1, 6)]
    assert rows(Path("two")) == rows(Path("whole"))

    checkpoint = Path("two/checkpoints/last.ckpt")
    assert checkpoint.is_dir()
    convert.hugging_face(str(checkpoint), "exported")
    decoder, _ = convert.load_checkpoint(checkpoint)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained("exported")(ids).logits
        assert torch.allclose(decoder(ids), exported, atol=1e-4)
    with capsys.disabled():
        print("\n  MiB of address space and of memory that each process took at most:")
        for name, found in (("one process", alone), ("whole run", whole), ("resumed", resumed)):
            print(f"  {name:<11}", {kind: [round(value) for value in values] for kind, values in found.items()})
