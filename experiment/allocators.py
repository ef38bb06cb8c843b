"""How memory is fetched from the system, for tensors of ever the same sizes; to be set before torch is imported.

Freed memory is kept for the next batch: given back, it would be faulted in anew, 5 % of a training's time and a fifth
of an evaluation's. Batches have few widths, so that it does not grow (see `rounded_width`
in experiment/sources/batches.py).
"""

import ctypes
import os
import sys

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


def set_up_allocators() -> None:
    """Set what the user has not set, for this process and those that it starts; nothing where it is not Linux."""
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
