"""Hardware capabilities."""

import functools

import torch


def fast_bfloat16(accelerator: str = "auto") -> bool:
    """Whether bfloat16 matrix products are faster than float32 on the training device.

    True for a CUDA GPU with native bfloat16 (Ampere and later), for a CPU with AMX, and for one with AVX512-BF16
    that is not Intel's. The one Intel CPU tried without AMX (an Emerald Rapids in a virtual machine that hides
    it) trained 1.5 times as fast in float32; products on an AMD Zen 4 are 2.2 times as fast in bfloat16. Without these
    instructions a CPU emulates bfloat16.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator in ("auto", "cpu") and not (accelerator == "auto" and torch.backends.mps.is_available()):
        found = torch.cpu.get_capabilities()
        return found.get("amx_tile", False) or (found.get("avx512_bf16", False) and "Intel" not in found["cpu_name"])
    return False


def default_device() -> torch.device:
    """The default device: the CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_precision(accelerator: str = "auto") -> str:
    """The trainer's default precision: ``bf16-mixed`` if that is fast here, else ``32-true``."""
    return "bf16-mixed" if fast_bfloat16(accelerator) else "32-true"


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here: it needs a C++ compiler and Python's headers for a CPU, Triton for a
    GPU. This tries it, which takes some seconds the first time."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device_type))
    except Exception:  # no compiler, no Triton, a GPU too old for it: each raises a different exception
        return False
    return True
