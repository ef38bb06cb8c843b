"""llama.cpp as a contender for one story, our weights as GGUF: its CPU library from the wheel llama-cpp-py-sync or,
where that does not load, xllamacpp."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import DEVICE

from lm.data.bpe import from_pieces
from lm.data.tokenizer import StoryTokenizer
from lm.model.decoder import Decoder


def why_not() -> str | None:
    """What is missing for it, or None."""
    if DEVICE != "cpu":
        return "its wheels are for a CPU"
    if find_spec("gguf") is None:
        return "pip install gguf"
    if _library() is None and find_spec("xllamacpp") is None:
        return "pip install llama-cpp-py-sync, or xllamacpp, whose wheel needs no new glibc"
    return None


def _library() -> tuple[Any, Any] | None:
    """llama-cpp-py-sync's cffi and library; None where it is not installed or its library does not load."""
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        return get_ffi(), get_lib()
    except (ImportError, RuntimeError):
        return None


def any_tokenizer(vocab_size: int) -> StoryTokenizer:
    """One of so many tokens, none of which will be read: a file needs one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c + d for a in " " + letters for b in letters for c in letters for d in letters]
    singles, pairs = [" ", *letters], [a + b for a in " " + letters for b in letters]
    triples = [pair + c for pair in pairs for c in letters]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *singles, *pairs, *triples, *words]
    return from_pieces(pieces[:vocab_size], [-float(i) for i in range(vocab_size)])


def write(decoder: Decoder, file: Path, type: str) -> None:
    """The decoder as GGUF: f16 or q8_0."""
    from lm.formats.gguf import to_gguf

    to_gguf(decoder.cpu(), any_tokenizer(decoder.config.vocab_size), file, type)


def story(measured: Callable[..., None], file: Path, prompt: list[int], new_tokens: int, threads: int) -> None:
    """Decodes greedily, again and again; tells tokens/s, without reading the file."""
    library = _library()
    if library is None:
        decode = _by_xllamacpp(file, prompt, new_tokens, threads)
    else:
        decode = _by_library(*library, file, prompt, new_tokens, threads)
    decode()
    measured(None)
    while True:
        measured(decode())


def _by_library(
    ffi: Any, lib: Any, file: Path, prompt: list[int], new_tokens: int, threads: int
) -> Callable[[], float]:
    @ffi.callback("void(enum ggml_log_level, const char *, void *)")
    def silent(level: int, text: Any, data: Any) -> None:
        pass

    lib.llama_log_set(silent, ffi.NULL)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = len(prompt) + new_tokens
    parameters.n_threads = parameters.n_threads_batch = threads
    context = lib.llama_init_from_model(model, parameters)
    greedy = lib.llama_sampler_init_greedy()

    def decode() -> float:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        ids = ffi.new("llama_token[]", prompt)
        begin = time.perf_counter()
        for _ in range(new_tokens):
            if lib.llama_decode(context, lib.llama_batch_get_one(ids, len(ids))) != 0:
                raise RuntimeError("llama.cpp could not decode")
            ids = ffi.new("llama_token[]", [lib.llama_sampler_sample(greedy, context, -1)])
        return new_tokens / (time.perf_counter() - begin)

    decode.kept = silent  # the library keeps no reference
    return decode


def _by_xllamacpp(file: Path, prompt: list[int], new_tokens: int, threads: int) -> Callable[[], float]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.verbosity = str(file), -1
    parameters.n_ctx, parameters.n_parallel = len(prompt) + new_tokens, 1
    parameters.cpuparams.n_threads = threads
    server = xllamacpp.Server(parameters)
    request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    return lambda: server.handle_completions(request)["timings"]["predicted_per_second"]  # its own figure
