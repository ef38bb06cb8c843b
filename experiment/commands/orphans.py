"""A process that a launcher has started ends when that is gone: from its first moment on, for imports take seconds."""

import os
import threading
import time

LAUNCHER = "TINYLAB_LAUNCHER"  # tells the processes that Lightning starts beside the first who that is
PULSE = 0.5  # seconds between two looks


def end_with_launcher() -> None:
    """End this process, where others of its launch are beside it, as soon as its launcher is gone."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[LAUNCHER] = str(os.getpid())
        return
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    launcher = os.getppid() if by_torchrun else int(os.environ.get(LAUNCHER, os.getppid()))
    threading.Thread(target=_wait_for_end, args=(launcher,), daemon=True).start()


def _wait_for_end(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(PULSE)
    os._exit(143)  # as after a SIGTERM; every file is written beside its place and renamed
