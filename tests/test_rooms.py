"""The packages are rooms on floors: a file imports from its own room and from the floors below it, and no more than a
command needs."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ("experiment", "experiment.compat"),  # errors, console, progress, quiet; private interfaces of libraries
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


def imports(file: Path, within_functions: bool = True) -> Iterator[str]:
    """The modules of ours that a file imports: all, or those that are loaded with it."""
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        later = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if within_functions or not later:
            nodes += ast.iter_child_nodes(node)
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


OPTIONAL = ("lm.formats", "lm.play", "lm.decoding.", "experiment.compare", "experiment.pages", "lm.data.demo")


def loaded(*modules: str) -> dict[str, int]:
    """The files of ours that importing these loads, and their lines."""
    found, left = {}, [*modules]
    while left:
        if (name := left.pop()) not in found:
            found[name] = len(FILES[name].read_text().splitlines())
            left += imports(FILES[name], within_functions=False)
    return found


@pytest.mark.slow
def test_training_loads_no_optional_part() -> None:
    found = loaded("lm.__main__", "lm.cli")
    surplus = {name for name in found if name.startswith(OPTIONAL)}
    assert not surplus
    assert len(found) <= 30
    assert sum(found.values()) <= 4500


@pytest.mark.slow
def test_a_training_step_is_read_in_few_files() -> None:
    """The module, the decoder, the loss, the optimizer and the data, and what they import of lm."""
    found = loaded("lm.training.module", "lm.model.decoder", "lm.model.loss", "lm.training.optim", "lm.data.module")
    own = {name: lines for name, lines in found.items() if name.startswith("lm.")}
    assert len(own) <= 12
    assert sum(own.values()) <= 2200


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("lm.")])
def test_no_file_is_long(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= 350


def private_names(file: Path) -> Iterator[str]:
    """Names with an underscore that a file takes from elsewhere: attributes, imports, and strings of getattr."""
    tree = ast.parse(file.read_text())
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"}  # fmt: skip
    for node in nodes:
        found: list[str] = []
        if isinstance(node, ast.Attribute) and not (is_super(node.value) and node.attr.startswith("_")):
            found = [node.attr] if node.attr not in own else []
        elif isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            found = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        for name in found:
            if name.startswith("_") and not name.endswith("__") and ast.unparse(node) != "os._exit":  # a public one
                yield f"line {node.lineno}: {ast.unparse(node)}"


def is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "super"


OUTSIDE_COMPAT = [module for module in FILES if not module.startswith("experiment.compat.")]


@pytest.mark.parametrize("module", OUTSIDE_COMPAT)
def test_private_names_of_libraries_stand_in_compat_only(module: str) -> None:
    assert not list(private_names(FILES[module]))


def test_no_class_replaces_a_private_method_of_a_library_outside_of_compat() -> None:
    replaced = []
    for name in OUTSIDE_COMPAT:
        if name.endswith("__main__"):
            continue
        try:
            module = import_module(name)
        except ImportError:  # of an optional package
            continue
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == name:
                foreign = [base for base in cls.__mro__ if base.__module__.split(".")[0] not in PACKAGES]
                known = {key for base in foreign for key in vars(base)}
                own = [key for key, value in vars(cls).items() if callable(value) or isinstance(value, property)]
                replaced += [f"{name}.{cls.__name__}.{key}" for key in own if is_private(key) and key in known]
    assert not replaced


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith(("__", "_cls"))  # autograd.Function makes a _backward_cls
