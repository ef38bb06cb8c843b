"""Precision by what the hardware can."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from torch._inductor.exc import GPUTooOldForTriton, TritonMissing

from experiment.nn.hardware import can_compile, default_precision, fast_bfloat16
from lm.__main__ import main
from tests.runs import TINY, write_stories


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux's list of instructions")
def test_bfloat16_is_chosen_on_a_cpu_that_is_fast_at_it_and_on_no_other() -> None:
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    described = {name.strip(): value.split() for name, _, value in lines}
    flags = described.get("flags", [])
    amd = "avx512_bf16" in flags and described["vendor_id"] != ["GenuineIntel"]
    assert fast_bfloat16("cpu") == (amd or "amx_tile" in flags)


@pytest.fixture
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The precision that is fast on a CPU of a kind."""
    # The one machine at hand has one answer; the other ones are put in its place.
    name, avx512_bf16, amx, precision = request.param
    found = {"cpu_name": name, "avx512_bf16": avx512_bf16, "amx_tile": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    return precision


CPUS = [
    ("AMD EPYC", False, False, "32-true"),
    ("AMD EPYC", True, False, "bf16-mixed"),
    ("Intel Xeon", True, False, "32-true"),
    ("Intel Xeon", True, True, "bf16-mixed"),
]


@pytest.mark.parametrize("precision", CPUS, indirect=True)
def test_precision_is_that_which_a_cpu_of_the_kind_is_fast_at(precision: str) -> None:
    assert default_precision("cpu") == precision


@pytest.mark.parametrize("precision", CPUS[:2], indirect=True)
def test_a_run_takes_the_precision_that_is_fast_unless_told_otherwise(precision: str, in_tmp: Path) -> None:
    arguments = ["fit", f"--data.path={write_stories(Path('stories'))}", *TINY, "--trainer.fast_dev_run=1"]
    assert main([*arguments, "--run_dir=run"]).trainer.precision == precision
    other = {"32-true": "bf16-mixed", "bf16-mixed": "32-true"}[precision]
    assert main([*arguments, "--run_dir=other", f"--trainer.precision={other}"]).trainer.precision == other


def test_a_run_that_shall_be_compiled_trains_without_a_compiler_too(
    in_tmp: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--trainer.fast_dev_run=1", "--trainer.limit_train_batches=1", "--model.compile=true", "--run_dir=run"]
    missing = {"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}
    can_compile.cache_clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch(missing):
        cli = main(["fit", f"--data.path={write_stories(Path('stories'))}", *TINY, *flags])
    can_compile.cache_clear()
    assert cli.model.decoder.compiled_block is None
    assert "model.compile does not work here" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [TritonMissing(None), GPUTooOldForTriton(SimpleNamespace(major=6, minor=1, name="GTX"), None)]
)
def test_a_gpu_without_triton_cannot_compile(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of torch's errors is a failure of its compiler's backend."""

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    can_compile.cache_clear()
    assert not can_compile("cpu")
    can_compile.cache_clear()
