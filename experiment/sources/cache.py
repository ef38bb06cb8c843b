"""Folders that are expensive to make, made once and shared by every process and every later run."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiment.errors import InputError


def cache_root() -> Path:
    """Where tinylab keeps what it can make again: $TINYLAB_CACHE, or $XDG_CACHE_HOME/tinylab, or ~/.cache/tinylab."""
    if own := os.environ.get("TINYLAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinylab"


def cached_folder(kind: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` fills for this key, built at most once.

    Several processes may ask at the same time: one builds, under a file lock, the others wait and find it. The
    folder is filled beside its final place and renamed, so that it is either complete or absent. The key is kept
    in the folder as ``key.json``, for people who wonder what it is.

    Args:
        kind: Subfolder of the cache, such as ``tokens``.
        key: Everything that the content depends on, as JSON can hold it.
        build: Fills the empty folder it is given.

    Raises:
        InputError: The cache folder cannot be written.
    """
    text = json.dumps(key, sort_keys=True)
    target = cache_root() / kind / hashlib.sha256(text.encode()).hexdigest()[:20]
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"the cache folder {target.parent} cannot be written ({error.strerror}): "
            "set TINYLAB_CACHE to a folder that can"
        ) from error
    try:
        if not target.is_dir():  # else another process built it while we waited
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                (partial / "key.json").write_text(text + "\n", encoding="utf-8")
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    finally:
        lock.release()
    return target
