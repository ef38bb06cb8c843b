"""Ctrl-C and SIGTERM: the step that runs is finished and saved, then the run ends. The second time it ends at once."""

import os
import signal
import threading
from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from experiment.compat.lightning import ask_for_no_sigterm


class Interrupted(BaseException):
    """The run was asked to stop, and has saved where it is.

    ``exit_code`` is what shells use for a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Remembers that someone asked the training to stop; `stop_request` is the one of this process."""

    def __init__(self) -> None:
        self.number = 0  # the signal, 0 for none

    def listen(self, trainer: Trainer) -> None:
        """Take both signals from here on; Lightning puts the old handlers back when the trainer is done."""
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.ask)
            signal.signal(signal.SIGTERM, self.ask)
            ask_for_no_sigterm(trainer)  # whose handler is gone

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)  # every file is written beside its place and renamed: nothing is left half-written
        self.number = number
        if rank_zero_only.rank == 0:  # not by print, which the signal may have come in the middle of
            os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def agreed(self, trainer: Trainer) -> int:
        """The signal to stop for, 0 for none. One process heeds its own at once; several stop together at the first
        step after it whose sums they read: on a CPU each, on GPUs a logged one."""
        if trainer.world_size == 1:
            return self.number
        return (self.number or signal.SIGTERM) if trainer.lightning_module.step_sums.stop_wanted else 0


stop_request = StopRequest()
