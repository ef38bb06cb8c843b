"""The packages are rooms on floors: a file imports from its own room and from the floors below it."""

import ast
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
