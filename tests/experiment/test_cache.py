"""A cached folder is complete or absent, and made once."""

import threading
from pathlib import Path

import pytest

from experiment.sources.paths import cached_folder


def test_folder_is_built_once_and_found_again() -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "data").write_text("x")

    first = cached_folder("test", {"name": "once"}, build)
    assert cached_folder("test", {"name": "once"}, build) == first
    assert len(built) == 1
    assert (first / "data").read_text() == "x"
    assert cached_folder("test", {"name": "other"}, build) != first


def test_build_that_fails_leaves_nothing_behind() -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cached_folder("test", {"name": "fails"}, fail)
    folder = cached_folder("test", {"name": "fails"}, lambda folder: None)
    assert not (folder / "half").exists()


def test_those_who_ask_together_get_one_folder() -> None:
    built, barrier, folders = [], threading.Barrier(4), []

    def ask() -> None:
        barrier.wait()
        folders.append(cached_folder("test", {"name": "together"}, built.append))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(set(folders)) == 1
