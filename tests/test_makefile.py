"""What `make` would run, without running it."""

import os
import subprocess
from pathlib import Path

MAKEFILE = Path(__file__).parents[1] / "Makefile"


def without_make() -> dict[str, str]:
    """The environment, but for what a make sets that runs these tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}


def fits(folder: Path) -> list[str]:
    """The trainings of `make demo` in a folder."""
    make = ["make", "--dry-run", "--assume-old=.venv/.ready", f"--file={MAKEFILE}", "demo"]
    printed = subprocess.run(make, cwd=folder, env=without_make(), check=True, capture_output=True, text=True).stdout
    return [line for line in printed.replace("\\\n", " ").splitlines() if " fit " in line]


def test_compare_without_a_file_names_one(tmp_path: Path) -> None:
    make = ["make", "--assume-old=.venv/.ready", f"--file={MAKEFILE}", "compare"]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready").touch()
    called = subprocess.run(make, cwd=tmp_path, env=without_make(), capture_output=True, text=True)
    assert called.returncode == 2 and not called.stdout
    assert called.stderr.startswith("error: FILE: not given; make compare FILE=configs/comparisons/recipes.yaml")


def test_demo_that_was_interrupted_goes_on_and_one_that_is_done_does_not(tmp_path: Path) -> None:
    ready = tmp_path / ".venv/.ready"
    ready.parent.mkdir()
    ready.touch()
    assert len(fits(tmp_path)) == 4 and "--ckpt_path" not in " ".join(fits(tmp_path))
    for name in ("demo-20260101-000000", "demo-20260102-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    begun = fits(tmp_path)
    assert all("--run_dir runs/demo-20260102-000000/" in fit and "--ckpt_path last" in fit for fit in begun)
    (tmp_path / "runs/demo").symlink_to("demo-20260102-000000")
    assert "demo-2026010" not in " ".join(fits(tmp_path)) and "--ckpt_path" not in " ".join(fits(tmp_path))
