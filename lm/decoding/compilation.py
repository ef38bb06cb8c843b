"""The decoding step of one token as compiled code.

For one story on a CPU a step of a small decoder takes a millisecond, and torch.compile's call overhead half of one.
There AOTInductor compiles the step once per decoder shape and caches it on disk for later processes; the code
reads the decoder's own weights, and a step is one call with the changing tensors. Several stories, GPUs, autocast
and types other than float32 go through torch.compile.
"""

import functools
import hashlib
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import experiment.compat.torch
import experiment.nn.attention
import lm.decoding.quantization
import lm.decoding.sampling
import lm.model.decoder
import lm.model.functional
import lm.model.kv_cache
from experiment.compat.torch import build_package, compiler_errors, load_package, maybe_mark_dynamic
from experiment.sources.paths import cached_folder
from lm.decoding.quantization import WeightDtype, prepare_for_decoding, weight_dtype
from lm.decoding.sampling import argmax
from lm.model.decoder import Decoder
from lm.model.kv_cache import KeyValueCache

PACKAGE = "step.pt2"
SOURCES: list[ModuleType] = [
    experiment.compat.torch,
    experiment.nn.attention,
    lm.model.kv_cache,
    lm.model.functional,
    lm.model.decoder,
    lm.decoding.quantization,
    lm.decoding.sampling,
]
# Hash of the step's source code: part of the cache key.
DIGEST = hashlib.sha256(
    b"".join(Path(module.__file__).read_bytes() for module in (*SOURCES, sys.modules[__name__]))
).hexdigest()


class CompilationError(ValueError):
    """The decoding step could not be compiled on this machine."""

    def __init__(self) -> None:
        super().__init__(
            "compile=True: the decoding step could not be compiled (is there a C++ compiler?); install g++ or leave "
            "compile out"
        )


class CompiledStep:
    """Logits (B, V) of the next tokens in float32, and their `argmax` (B,).

    Args:
        decoder: In eval mode, prepared for decoding or plain.
        num_rows: Number of stories at the start.

    Raises:
        CompilationError: There is no compiler.
        InputError: The cache folder cannot be written.
    """

    def __init__(self, decoder: Decoder, num_rows: int) -> None:
        self.decoder = decoder
        weight = decoder.embedding.weight
        plain = (weight.dtype, weight.device.type) == (torch.float32, "cpu") and not torch.is_autocast_enabled("cpu")
        self.format = weight_dtype(decoder) if plain and num_rows == 1 else None
        self.known: tuple[KeyValueCache | None, int, int] = (None, 0, 0)
        if self.format is not None:
            self.code = _machine_code(_package(decoder, self.format))
            self.weights = _weights(decoder, self.code.loader)
        else:
            self.compiled = compiled_step(weight.device.type)

    def __call__(self, input_ids: Tensor, cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """Append input_ids (B, 1) to the cache, without updating its host-side count."""
        if self.format is not None:
            logits, tokens = self.code.run(self, [input_ids, cache.lengths, *cache.buffers])
            return logits, tokens
        # After a batch's first step all guards hold: same decoder, cache and shapes. Checking them takes a tenth of
        # the time.
        state = (cache, len(input_ids), cache.capacity)
        known, self.known = state == self.known, state
        if not known:
            cache.mark_dynamic()
            maybe_mark_dynamic(input_ids, 0)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=known):
            try:
                return self.compiled(self.decoder, input_ids, cache)
            except compiler_errors() as error:
                raise CompilationError from error


def one_token(
    decoder: Decoder, input_ids: Tensor, cache: KeyValueCache, slots: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The compiled function: see `CompiledStep`; slots as in `KeyValueCache.next_span`."""
    logits = decoder.logits(decoder.run(input_ids, cache, cache.next_span(slots))[:, -1]).float()
    cache.lengths += 1
    return logits, argmax(logits)


@functools.cache
def compiled_step(device_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`one_token` compiled by torch.compile, once per process for all decoders."""
    # On a CPU, allocating results from Python would take a tenth of a step.
    return torch.compile(one_token, options={"cpp_wrapper": True} if device_type == "cpu" else None)


class _Step(nn.Module):
    """`one_token` with tensors as its only arguments."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, lengths: Tensor, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
        return one_token(self.decoder, input_ids, KeyValueCache.of(buffers, lengths))


class _MachineCode:
    """Loaded code, one per shape and process; it reads the weights of the step that ran last."""

    def __init__(self, package: Path) -> None:
        self.loader = load_package(package)
        self.lock = Lock()
        # The compiled code keeps references to its constants, so we keep those tensors and swap their storage.
        self.slots: dict[str, Tensor] = {}
        self.bound: Callable[[], CompiledStep | None] = lambda: None

    def run(self, step: CompiledStep, inputs: list[Tensor]) -> list[Tensor]:
        with self.lock:
            if self.bound() is not step:
                for name, weight in step.weights.items():
                    self.slots.setdefault(name, torch.empty_like(weight)).set_(weight)
                self.loader.load_constants(self.slots, False, True, True)
                self.bound = weakref.ref(step)
            return self.loader.boxed_run(inputs)


_machine_code = functools.cache(_MachineCode)


def _weights(decoder: Decoder, loader: Any) -> dict[str, Tensor]:
    step = _Step(decoder)
    tensors = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    return {name: tensors[name].detach().contiguous() for name in loader.get_constant_fqns()}


def _package(decoder: Decoder, format: WeightDtype) -> Path:
    """The cached code for decoders of this shape, without weights; compiled if missing."""
    key = {
        "decoder": asdict(decoder.config),
        "weights": format,
        "threads": torch.get_num_threads(),
        "cpu": dict(torch.cpu.get_capabilities()),
        "torch": str(torch.__version__),
        "source": DIGEST,
    }
    return cached_folder("steps", key, lambda folder: _build(decoder, format, folder / PACKAGE)) / PACKAGE


@torch.inference_mode(False)
@torch.no_grad()
def _build(decoder: Decoder, format: WeightDtype, package: Path) -> None:
    # A new decoder: export cannot trace weights created in inference mode.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        step = _Step(prepare_for_decoding(Decoder(decoder.config).float().eval(), format))
    cache = KeyValueCache(decoder.config, 1, 2)
    slots = torch.export.Dim("slots", min=3)
    inputs = (torch.zeros(1, 1, dtype=torch.int64), cache.lengths, cache.buffers)
    shapes = (None, None, [{2: slots} for _ in cache.buffers])
    program = torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)
    options: dict[str, Any] = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own warning about its own names
            build_package(program, package, options)
    except compiler_errors() as error:
        raise CompilationError from error
