"""The decoding step of one token as compiled code.

For one story on a CPU a step of a small decoder takes about a millisecond, and torch.compile's way from Python to
the compiled code and back takes half a millisecond more. There the step is machine code that AOTInductor makes once for
a shape of decoder and keeps in tinylab's cache folder, where later processes find it ready; it reads the decoder's own
weights, and takes from Python one call with the tensors that change. Several stories at a time, a GPU, autocast and
other types than float32 go through torch.compile.
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

import experiment.nn.attention
import lm.decoding.quantization
import lm.decoding.sampling
import lm.model.decoder
import lm.model.functional
import lm.model.kv_cache
from experiment.sources.cache import cached_folder
from lm.decoding.quantization import WeightDtype, prepare_for_decoding, weight_dtype
from lm.decoding.sampling import argmax
from lm.model.decoder import Decoder
from lm.model.kv_cache import KeyValueCache

PACKAGE = "step.pt2"
SOURCES: list[ModuleType] = [
    experiment.nn.attention,
    lm.model.kv_cache,
    lm.model.functional,
    lm.model.decoder,
    lm.decoding.quantization,
    lm.decoding.sampling,
]
# What the step consists of, as it was when it was imported: other code makes another step.
DIGEST = hashlib.sha256(
    b"".join(Path(module.__file__).read_bytes() for module in (*SOURCES, sys.modules[__name__]))
).hexdigest()
COMPILER_FAILED = (
    torch._dynamo.exc.BackendCompilerFailed,
    torch._inductor.exc.CppCompileError,
    torch._inductor.exc.InvalidCxxCompiler,
)


class CompilationError(ValueError):
    """The decoding step could not be compiled on this machine."""

    def __init__(self) -> None:
        super().__init__(
            "compile=True: the decoding step could not be compiled, for want of a C++ compiler perhaps; install g++ or "
            "leave compile out"
        )


class CompiledStep:
    """Logits (B, V) of the next tokens, float32, and the likeliest of each row (B,) as `argmax` gives them.

    Args:
        decoder: In eval mode; as `prepare_for_decoding` lays it out, or as it is.
        num_rows: How many stories the decoding begins with.

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
        """One more token a row, input_ids (B, 1), which the cache then holds, but for its count on the host."""
        if self.format is not None:
            logits, tokens = self.code.run(self, [input_ids, cache.lengths, *cache.buffers])
            return logits, tokens
        # After the first step of a batch its guards hold: the same decoder, cache and shapes. To check them again
        # would take a tenth of the time.
        state = (cache, len(input_ids), cache.capacity)
        known, self.known = state == self.known, state
        if not known:
            cache.mark_dynamic()
            torch._dynamo.maybe_mark_dynamic(input_ids, 0)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=known):
            try:
                return self.compiled(self.decoder, input_ids, cache)
            except COMPILER_FAILED as error:
                raise CompilationError from error


def one_token(
    decoder: Decoder, input_ids: Tensor, cache: KeyValueCache, slots: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What is compiled: see `CompiledStep`; slots as in `KeyValueCache.next_span`."""
    logits = decoder.logits(decoder.run(input_ids, cache, cache.next_span(slots))[:, -1]).float()
    cache.lengths += 1
    return logits, argmax(logits)


@functools.cache
def compiled_step(device_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`one_token` by torch.compile, once a process, for every decoder."""
    # On a CPU a step is so short that allocating its results from Python takes a tenth of it.
    return torch.compile(one_token, options={"cpp_wrapper": True} if device_type == "cpu" else None)


class _Step(nn.Module):
    """`one_token` of tensors alone."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, lengths: Tensor, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
        return one_token(self.decoder, input_ids, KeyValueCache.of(buffers, lengths))


class _MachineCode:
    """Loaded code, of which a process has one for each shape, since it is never quite unloaded. It reads the weights of
    the step that ran last."""

    def __init__(self, package: Path) -> None:
        self.loader = torch._inductor.aoti_load_package(str(package)).loader
        self.lock = Lock()
        # The code never lets go of the tensors that it was given: these stay, what they hold changes.
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


def _weights(decoder: Decoder, loader: torch._C._aoti.AOTIModelPackageLoader) -> dict[str, Tensor]:
    step = _Step(decoder)
    tensors = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    return {name: tensors[name].detach().contiguous() for name in loader.get_constant_fqns()}


def _package(decoder: Decoder, format: WeightDtype) -> Path:
    """The machine code for decoders of this shape, without weights: in the cache, made if need be."""
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
    # Weights of its own, since export cannot look at those that were made in inference mode.
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
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own names
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
    except COMPILER_FAILED as error:
        raise CompilationError from error
