"""What a command does before torch is imported: it answers --help, sets up memory, and watches its launcher."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence

COMMANDS = ("fit", "validate", "test", "predict")
LAUNCHER = "TINYLAB_LAUNCHER"  # tells the processes that Lightning starts beside the first who that is
# By which torchrun, SLURM, LSF, MPI, Kubeflow, or whoever starts a process on each machine, number processes.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK",
             "MV2_COMM_WORLD_SIZE", "RANK", "NODE_RANK")  # fmt: skip
PULSE = 0.5  # seconds between two looks

VARIABLES = {
    # Put tensors of 2 MiB and more into huge pages, where the system gives them on request.
    "THP_MEM_ALLOC_ENABLE": "1",
    # A GPU's memory grows in place, so that a batch of another width finds room.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
# glibc's: the variable that a user would set, the number by which its mallopt knows it, and our value.
GLIBC = {"MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1)}
_GIVE_BACK = {"MALLOC_MMAP_MAX_": (-4, 65536), "MALLOC_MMAP_THRESHOLD_": (-3, 2**20)}
_FOREIGN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # whoever sets these has chosen an allocator's settings


def start(overview: str, args: Sequence[str]) -> None:
    """Begin a command line, before its imports, which take seconds."""
    answer(overview, args)
    set_up_allocators()
    end_with_launcher()


def answer(overview: str, args: Sequence[str], commands: Iterable[str] = COMMANDS, options_first: bool = True) -> None:
    """End here where the arguments ask for the overview (exit code 0), or name no known command (2), or where the
    system is not supported (2). With `options_first` a command may come after its options."""
    if sys.platform == "win32":  # has neither signals, locks nor links as they are used here
        print("error: Windows is not supported: expected Linux or macOS; use WSL (wsl --install)", file=sys.stderr)
        sys.exit(2)
    if args and args[0] in ("-h", "--help"):
        from experiment.wording import as_called

        print(as_called(overview.strip()))
        sys.exit(0)
    if not args or (args[0] not in commands and not (options_first and args[0].startswith("-"))):
        from experiment.wording import hint

        found = f"{args[0]!r} is not a command{hint(args[0], commands)}" if args else "no command is given"
        print(f"error: {found}: expected {', '.join(commands)}; --help explains them", file=sys.stderr)
        sys.exit(2)


def set_up_allocators() -> None:
    """Set what the user has not set, for this process and those that it starts; nothing where it is not Linux.

    Freed memory is kept for the next batch: given back, it would be faulted in anew, 5 % of a training's time and a
    fifth of an evaluation's. Batches have few widths, so that it does not grow (see `rounded_width` in
    experiment/sources/batches.py).
    """
    if sys.platform != "linux":
        return
    for name, value in VARIABLES.items():
        if name != "PYTORCH_ALLOC_CONF" or "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault(name, value)
    _set_glibc(GLIBC)


def give_back_large_blocks() -> None:
    """From now on, return blocks of a MiB and more to the system as soon as they are freed.

    For weights that are fetched for one layer at a time: between what lives longer, kept blocks leave holes, which came
    to more than half of what was in use.
    """
    if sys.platform == "linux":
        _set_glibc(_GIVE_BACK)


def _set_glibc(options: dict[str, tuple[int, int]]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith(_FOREIGN) for name in os.environ):
        for number, value in options.values():
            mallopt(number, value)


def leave_slurm_alone() -> None:
    """Within a SLURM job, be one process unless srun has started it.

    Lightning takes every process of a job for one of several tasks, and ends where the variables of srun are missing.
    """
    if "SLURM_NTASKS" in os.environ and "SLURM_STEP_ID" not in os.environ:
        os.environ["SLURM_JOB_NAME"] = "interactive"  # by which Lightning tells such a process


def is_alone() -> bool:
    """Whether no launcher has started this process beside others; those that Lightning starts itself are alone, too."""
    return not any(name in os.environ for name in LAUNCHERS)


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
