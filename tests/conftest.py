"""What all tests share: no network, caches of their own, and the real data where it is at hand."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest

from experiment.quiet import IGNORED, quiet_libraries

ROOT = Path(__file__).parent.parent


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
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
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
