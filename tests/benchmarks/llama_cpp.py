"""llama.cpp as a contender for one story: its CPU library from the wheel llama-cpp-py-sync, our weights as GGUF."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import DEVICE

from lm.model import Decoder
from lm.tokenizer import StoryTokenizer, from_pieces


def why_not() -> str | None:
    """What is missing for it, or None."""
    if DEVICE != "cpu":
        return "its wheel is for a CPU"
    if find_spec("lm.gguf") is None:
        return "this tinylab does not write GGUF"
    for module, package in (("llama_cpp_py_sync", "llama-cpp-py-sync"), ("gguf", "gguf")):
        if find_spec(module) is None:
            return f"pip install {package}"
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
    from lm.gguf import to_gguf

    to_gguf(decoder.cpu(), any_tokenizer(decoder.config.vocab_size), file, type)


def story(measured: Callable[..., None], file: Path, prompt: list[int], new_tokens: int, threads: int) -> None:
    """Decodes greedily, again and again; tells tokens/s without reading the file, and the ``tokens``."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()

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

    def decode() -> list[int]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        ids, tokens = ffi.new("llama_token[]", prompt), []
        while len(tokens) < new_tokens:
            if lib.llama_decode(context, lib.llama_batch_get_one(ids, len(ids))) != 0:
                raise RuntimeError("llama.cpp could not decode")
            tokens.append(lib.llama_sampler_sample(greedy, context, -1))
            ids = ffi.new("llama_token[]", tokens[-1:])
        return tokens

    tokens = decode()
    measured(None, tokens=tokens)
    while True:
        begin = time.perf_counter()
        tokens = decode()
        measured(new_tokens / (time.perf_counter() - begin), tokens=tokens)
