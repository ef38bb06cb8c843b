"""Precision by what the hardware can."""

from pathlib import Path

import pytest
import torch
import torch._inductor.config

from experiment.hardware import can_compile, default_precision, fast_bfloat16
from lm.__main__ import main
from tests.runs import TINY, write_stories


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux's list of instructions")
def test_bfloat16_is_chosen_on_a_cpu_with_its_instructions_and_on_no_other() -> None:
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), ""
    ).split()
    assert fast_bfloat16("cpu") == any(name in flags for name in ("avx512_bf16", "amx_bf16", "amx_tile"))


@pytest.mark.parametrize(
    ("instructions", "precision"),
    [((False, False), "32-true"), ((True, False), "bf16-mixed"), ((False, True), "bf16-mixed")],
)
def test_a_run_takes_the_precision_that_is_fast_unless_told_otherwise(
    instructions: tuple[bool, bool], precision: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one machine at hand has one answer; the other ones are put in its place.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions[0])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: instructions[1])
    assert default_precision("cpu") == precision
    arguments = ["fit", f"--data.path={write_stories(Path('stories'))}", *TINY, "--trainer.fast_dev_run=1"]
    assert main([*arguments, "--run_dir=run"]).trainer.precision == precision
    other = {"32-true": "bf16-mixed", "bf16-mixed": "32-true"}[precision]
    assert main([*arguments, "--run_dir=other", f"--trainer.precision={other}"]).trainer.precision == other


@pytest.mark.parametrize("compiler", [True, False])
def test_a_run_that_shall_be_compiled_trains_without_a_compiler_too(
    compiler: bool, in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--trainer.fast_dev_run=1", "--trainer.limit_train_batches=1", "--model.compile=true", "--run_dir=run"]
    missing = {} if compiler else {"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}
    can_compile.cache_clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch(missing):
        cli = main(["fit", f"--data.path={write_stories(Path('stories'))}", *TINY, *flags])
    can_compile.cache_clear()
    assert (cli.model.decoder.compiled_block is not None) == compiler
    assert ("model.compile does not work here" in capsys.readouterr().out) == (not compiler)
