"""Decoding: our `generate` against transformers', llama.cpp and, where its binary is given, llama2.c's run.c.

    python tests/benchmarks/decoding.py [--llama2c ./run --tokenizer FOLDER] [--batch_size 32]

All have the same weights, drawn at random, and decode greedily with a cache; in float32 ours and transformers must
choose the same tokens, or the benchmark ends with an error. transformers has a cache that grows and a static one, with
which it compiles its step on a GPU (not on a CPU); the ratios are to the faster. run.c is to be built with
`gcc -Ofast -fopenmp -march=native`; it needs a tokenizer of as many tokens as the decoder has.
"""

import copy
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import llama_cpp
import torch
from common import DEVICE, ROUNDS, Row, Worker, alternate, beside, fastest, left_out, make_row, report
from jsonargparse import auto_cli
from transformers import LlamaConfig, LlamaForCausalLM

from lm.data.tokenizer_files import load_tokenizer
from lm.decoding.generation import generate
from lm.decoding.quantization import WeightDtype, prepare_for_decoding
from lm.formats.hugging_face import split_weights
from lm.formats.llama2c import llama2c_tokenizer_path, to_llama2c
from lm.model.config import DecoderConfig, GenerationConfig
from lm.model.decoder import Decoder

SHAPE = DecoderConfig(max_sequence_length=256)  # 15.4 million weights
BOS = 1
FORMATS: dict[str, WeightDtype] = {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}


def make_decoder(config: DecoderConfig = SHAPE) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).eval().to(DEVICE)


def make_transformers(decoder: Decoder, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """transformers' Llama with the decoder's weights."""
    config = decoder.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_sequence_length,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=BOS,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    model.load_state_dict(split_weights(decoder), strict=not config.tie_embeddings)
    return model.eval().to(DEVICE, dtype)


def on_gpu(decoder: Decoder, format: str) -> Decoder:
    """The decoder in float32 or, a copy, in bf16: fewer bits are for a CPU."""
    if format == "int8":
        raise RuntimeError("int8 is decoded on a CPU: leave it out of --formats")
    return decoder if format == "float32" else copy.deepcopy(decoder).to(torch.bfloat16)


def make_prompts(batch_size: int) -> list[list[int]]:
    return [[BOS, 100 + row, 200 + row, 300 + row] for row in range(batch_size)]


def ours(
    decoder: Decoder, prompts: list[list[int]], new_tokens: int, tokens: list[list[int]] | None = None, **settings
) -> Callable[[], float]:
    """Measures tokens/s of our `generate`; `tokens` are those that it must choose."""
    config = GenerationConfig(**{"max_new_tokens": new_tokens, "temperature": 0, **settings})

    def measure() -> float:
        begin = time.perf_counter()
        stories = [result.token_ids for result in generate(decoder, prompts, config)]
        seconds = time.perf_counter() - begin
        if tokens is not None and stories != tokens:
            raise RuntimeError(f"{config}: not the tokens of transformers")
        return sum(map(len, stories)) / seconds

    return measure


def peer(
    model: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, cache: str | None = None
) -> Callable[[], float]:
    """Measures tokens/s of transformers' `generate`, with a cache that grows or a "static" one."""

    def measure() -> float:
        begin = time.perf_counter()
        transformers_tokens(model, prompts, new_tokens, cache)
        return len(prompts) * new_tokens / (time.perf_counter() - begin)

    return measure


def transformers_tokens(
    model: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, cache: str | None = None
) -> list[list[int]]:
    ids = torch.tensor(prompts, device=DEVICE)
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "cache_implementation": cache}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out[:, ids.shape[1] :].tolist()


def run_c(binary: Path, weights: Path, steps: int) -> Callable[[], float]:
    """Measures tokens/s of llama2.c's run.c, as it reports them itself: without reading the file."""

    def measure() -> float:
        command = [binary, weights, "-z", llama2c_tokenizer_path(weights), "-t", "0", "-n", str(steps), "-i", "Once"]
        done = subprocess.run(list(map(str, command)), capture_output=True, check=True)
        return float(re.search(rb"achieved tok/s: ([\d.]+)", done.stderr).group(1))

    return measure


def decode_contenders(
    batch_size: int = 1,
    new_tokens: int = 200,
    formats: Sequence[str] = ("float32", "bf16", "int8"),
    peers: Sequence[str] = ("float32",),
    eager: bool = True,
) -> dict[str, Callable[[], float]]:
    """What is compared, warmed up: by name, a function that decodes once and gives tokens/s.

    Args:
        batch_size: Stories at a time.
        new_tokens: Of each.
        formats: Of our weights; float32, bf16 and int8; decoded by a compiled step.
        peers: Precisions of transformers: float32, bf16.
        eager: Whether to add our plain step in float32.
    """
    decoder, prompts = make_decoder(), make_prompts(batch_size)
    reference = make_transformers(decoder)
    tokens = transformers_tokens(reference, prompts, new_tokens)
    contenders: dict[str, Callable[[], float]] = {}
    for name in peers:
        model = reference if name == "float32" else make_transformers(decoder, torch.bfloat16)
        contenders[f"transformers {name}"] = peer(model, prompts, new_tokens)
        contenders[f"transformers {name}, static cache"] = peer(model, prompts, new_tokens, "static")
    if eager:
        contenders["ours float32 eager"] = ours(decoder, prompts, new_tokens, tokens)
    for name in formats:
        expected = tokens if name == "float32" else None
        prepared = prepare_for_decoding(decoder, FORMATS[name]) if DEVICE == "cpu" else on_gpu(decoder, name)
        contenders[f"ours {name}"] = ours(prepared, prompts, new_tokens, expected, compile=True)
    for measure in contenders.values():
        measure()
    return contenders


def against_transformers(name: str, results: dict[str, list[float]], format: str, note: str) -> Row:
    peers = [f"transformers {format}", f"transformers {format}, static cache"]
    speeds = results[f"ours {format}"], results[fastest(results, peers)]
    return make_row(name, *speeds, "tokens/s", f"greedy, cached; ours compiled; {note}; {beside(results, peers)}")


def rows(rounds: int = ROUNDS, new_tokens: int = 200) -> list[Row]:
    """The rows decode_float32, decode_bf16 and decode_batch32 of `make bench`."""
    one = alternate(decode_contenders(1, new_tokens, ("float32", "bf16"), ("float32", "bf16"), eager=False), rounds)
    batch = alternate(decode_contenders(32, new_tokens, ("float32",), eager=False), rounds)
    return [
        against_transformers("decode_float32", one, "float32", f"{new_tokens} tokens, the same"),
        against_transformers("decode_bf16", one, "bf16", f"{new_tokens} tokens"),
        against_transformers("decode_batch32", batch, "float32", f"32 stories of {new_tokens} tokens, the same"),
    ]


def gpu_rows(rounds: int = ROUNDS, new_tokens: int = 200) -> list[Row]:
    """On a GPU in bf16: against transformers, and sampling against greedy decoding."""
    if DEVICE != "cuda":
        left_out("decode_gpu", "there is no GPU")
        return []
    found = []
    for batch in (1, 32, 256):
        contenders = decode_contenders(batch, new_tokens, ("bf16",), ("bf16",), eager=False)
        sampling = {"temperature": 0.8, "top_p": 0.9, "compile": True}
        contenders["sampled"] = ours(on_gpu(make_decoder(), "bf16"), make_prompts(batch), new_tokens, **sampling)
        contenders["sampled"]()
        results = alternate(contenders, rounds)
        note = f"{batch} stories of {new_tokens} tokens"
        found.append(against_transformers(f"decode_gpu_{batch}", results, "bf16", note))
        speeds = results["sampled"], results["ours bf16"]
        note = f"ours, bf16, {note}: temperature 0.8 and top-p 0.9 / greedy"
        found.append(make_row(f"decode_gpu_{batch}_sampled", *speeds, "tokens/s", note))
    return found


def llama_cpp_rows(rounds: int = ROUNDS, new_tokens: int = 200) -> list[Row]:
    """One story against llama.cpp, ours with as many bits: bfloat16 to its float16, int8 to its Q8_0."""
    if (why := llama_cpp.why_not()) is not None:
        left_out("llama.cpp", why)
        return []
    decoder, prompts, found = make_decoder(), make_prompts(1), []
    with tempfile.TemporaryDirectory() as folder:
        for format, type in (("bf16", "f16"), ("int8", "q8_0")):
            file = Path(folder) / f"{type}.gguf"
            llama_cpp.write(decoder, file, type)
            with Worker(llama_cpp.story, file, prompts[0], new_tokens, torch.get_num_threads()) as worker:
                contenders = decode_contenders(1, new_tokens, (format,), (), eager=False)
                results = alternate({**contenders, "llama.cpp": worker}, rounds)
            note = f"one story, {new_tokens} tokens, greedy; {format} / {type}"
            row = f"decode_llama_cpp_{type}"
            found.append(make_row(row, results[f"ours {format}"], results["llama.cpp"], "tokens/s", note))
    return found


def main(
    batch_size: int = 1,
    new_tokens: int = 200,
    rounds: int = ROUNDS,
    formats: Sequence[str] = ("float32", "bf16", "int8"),
    peers: Sequence[str] = ("float32",),
    llama2c: Path | None = None,
    tokenizer: str | None = None,
) -> None:
    """Measures the contenders in turn, and prints the medians and their ratio to transformers in float32.

    Args:
        batch_size: Stories at a time.
        new_tokens: Of each.
        rounds: How often each is measured.
        formats: Of our weights: float32, bf16, int8.
        peers: Precisions of transformers: float32, bf16.
        llama2c: Binary of llama2.c's run.c, which decodes one story in float32.
        tokenizer: For llama2c: of 32,768 tokens.
    """
    if llama2c is not None and tokenizer is None:
        print("error: --llama2c needs --tokenizer, one of 32,768 tokens: name its folder", file=sys.stderr)
        sys.exit(2)
    contenders = decode_contenders(batch_size, new_tokens, formats, peers)
    with tempfile.TemporaryDirectory() as folder:
        if llama2c is not None:
            weights = Path(folder) / "model.bin"
            to_llama2c(make_decoder().cpu(), load_tokenizer(tokenizer), weights)
            contenders["llama2.c"] = run_c(llama2c, weights, new_tokens)
            contenders["llama2.c"]()
        results = alternate(contenders, rounds)
    baseline = results[fastest(results, [name for name in results if name.startswith(f"transformers {peers[0]}")])]
    report([make_row(name, found, baseline, "tokens/s") for name, found in results.items()], file=None)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
