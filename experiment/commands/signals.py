"""Signals that end a process anywhere, even inside a collective, where Python runs no signal handlers."""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

from experiment.runs.stopping import StopRequest
from experiment.startup import imports_are_done

ENDING = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0  # seconds for a process to end on its own
PULSE = 1.0  # seconds between two checks


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """In this context SIGTERM raises an exception, as Ctrl-C does, and a thread ends the process if that has no effect.

    The thread ends it at the second signal, or `GRACE` seconds after the first unless a training treats that as a
    request to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    imports_are_done()
    before = signal.signal(signal.SIGTERM, _raise)
    read, write = os.pipe()
    os.set_blocking(write, False)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # gets the number of each signal, in C
    threading.Thread(target=_watch, args=(read,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        os.close(write)  # which ends the thread


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise SIGTERMException


def _watch(read: int) -> None:
    received, deadline, number = 0, float("inf"), signal.SIGTERM
    while received < 2 and time.monotonic() < deadline:
        ready, _, _ = select.select([read], [], [], PULSE)
        if not ready:
            continue
        if not (byte := os.read(read, 1)):
            os.close(read)
            return
        if byte[0] in ENDING:
            received, number = received + 1, byte[0]
            if getattr(signal.getsignal(number), "__func__", None) is not StopRequest.ask:
                deadline = time.monotonic() + GRACE
    os._exit(128 + number)  # files are written under a temporary name and renamed: none is left half-written
