"""What all tests share: no network, caches of their own, and the real data where it is at hand."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small lose more by handing work over than they gain
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tinylab-datasets-")  # read once, when datasets is imported
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TINYLAB_FIT__REPORT"] = "false"  # of the hundred runs of the suite, nobody looks at the pages

import pytest

from experiment.quiet import IGNORED, quiet_libraries
from tests.processes import Commands

ROOT = Path(__file__).parent.parent
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--repeats", type=int, default=1, help="how often the tests that draw moments at random are run")
    parser.addoption("--fuzz", type=int, default=None, help="damaged files that each reader is given")
    parser.addoption("--thorough", action="store_true", help="also what takes minutes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "repeat" in metafunc.fixturenames:
        metafunc.parametrize("repeat", range(metafunc.config.getoption("repeats")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What asks for processes, flags of a whole run, a folder for runs, or real data is slow."""
    for item in items:
        if {"commands", "small_run", "in_tmp", "shared"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """Every warning is an error, but for those that users are not shown either."""
    quiet_libraries()
    for message, category in IGNORED:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokens and tokenizers for this session alone."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TINYLAB_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, tokenizers and a real small model; a user has none of it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real data), which is not here")
    return folder


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that runs/ of the repository stays as it is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Commands as processes of their own."""
    commands = Commands()
    yield commands
    commands.close()
