"""The packages are rooms on floors: a file imports from its own room and from the floors below it, and no more than a
command needs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ("experiment",),  # errors, console, progress, quiet
    ("experiment.nn",),
    ("experiment.sources",),
    ("experiment.runs",),
    ("experiment.pages",),
    ("experiment.commands",),
    ("experiment.compare",),
    ("lm.model", "lm.data"),
    ("lm.formats",),
    ("lm.decoding",),
    ("lm.training",),
    ("lm", "classify"),
    ("tinylab",),
]
PACKAGES = ("experiment", "lm", "classify", "tinylab")
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
    if file.name != "__init__.py"
}


def imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports, within functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield next(module for module in (name, name.rpartition(".")[0]) if module in FILES)


def floor(module: str) -> int:
    room = module.rpartition(".")[0]
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("module", FILES)
def test_no_file_imports_upward(module: str) -> None:
    room = module.rpartition(".")[0]
    for other in imports(FILES[module]):
        assert other.rpartition(".")[0] == room or floor(other) < floor(module), f"{module} imports {other}"


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: set(imports(file)) for module, file in FILES.items()}).prepare()  # raises CycleError


OPTIONAL = ("lm.formats", "lm.play", "lm.decoding.", "experiment.compare", "lm.data.demo")


def loaded(*modules: str) -> dict[str, int]:
    """The files of ours that importing these loads in a new process, and their lines; of `__init__` there are none."""
    script = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: len(FILES[name].read_text().splitlines()) for name in names.split() if name in FILES}


def test_training_loads_no_optional_part() -> None:
    found = loaded("lm.__main__", "lm.cli")
    surplus = {name for name in found if name.startswith(OPTIONAL)} - {"lm.decoding.config"}
    assert not surplus
    assert len(found) <= 52
    assert sum(found.values()) <= 7300


def test_a_training_step_is_read_in_few_files() -> None:
    """The module, the decoder, the loss, the optimizer and the data, and what they import of lm."""
    found = loaded("lm.training.module", "lm.model.decoder", "lm.model.loss", "lm.training.optim", "lm.data.module")
    own = {name: lines for name, lines in found.items() if name.startswith("lm.")}
    assert len(own) <= 12
    assert sum(own.values()) <= 2200


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("lm.")])
def test_no_file_is_long(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= 350
