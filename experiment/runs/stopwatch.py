"""Time that training takes, without what stands between."""

import time

import torch


class Stopwatch:
    """Wall time without pauses, which may be nested."""

    def __init__(self) -> None:
        self._start, self._pauses = time.perf_counter(), 0
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused

    def pause(self) -> None:
        """What the GPU was given before has still to be done: that is waited for, and is no pause."""
        if self._pauses == 0:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._since = time.perf_counter()
        self._pauses += 1

    def resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            self._paused += time.perf_counter() - self._since

    def __enter__(self) -> None:
        self.pause()

    def __exit__(self, *_: object) -> None:
        self.resume()
