"""Weights to and from Hugging Face and llama2.c, against transformers and llama2.c's own output."""

import json
import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lm.__main__ import main as lm
from lm.convert import main as convert
from lm.data.tokenizer import StoryTokenizer
from lm.decoding.generation import generate
from lm.formats.gguf import to_gguf
from lm.formats.hugging_face import from_hugging_face, to_hugging_face
from lm.formats.llama2c import from_llama2c, llama2c_tokenizer_path, to_llama2c
from lm.formats.pretrained import load_checkpoint
from lm.model.config import GenerationConfig
from tests.lm.small import VOCAB_SIZE, assert_refused, logits, make_decoder, make_tokenizer, random_ids
from tests.runs import write_stories


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return make_tokenizer(VOCAB_SIZE)


VARIANTS = [
    {},
    {"tie_embeddings": False, "num_kv_heads": None},
    {"tie_embeddings": False, "num_kv_heads": 1, "num_layers": 1, "max_sequence_length": 33},
]
HUGGING_FACE_VARIANTS = [*VARIANTS, {"rope_theta": 500000.0, "rms_norm_eps": 1e-6}, {"query_key_norm": True}]


@pytest.mark.parametrize("changes", HUGGING_FACE_VARIANTS)
def test_export_to_hugging_face_and_back_gives_identical_logits(tokenizer, changes, tmp_path):
    decoder = make_decoder(**changes)
    to_hugging_face(decoder, tokenizer, tmp_path / "model")
    back, tokenizer_back = from_hugging_face(tmp_path / "model")
    assert back.config == replace(decoder.config, num_kv_heads=decoder.config.kv_heads)
    assert torch.equal(logits(back, random_ids()), logits(decoder, random_ids()))
    text = "Once upon a time, naïve Tom said </s>"
    assert tokenizer_back.encode(text) == tokenizer.encode(text)
    assert (tokenizer_back.bos_id, tokenizer_back.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("changes", VARIANTS)
def test_export_to_llama2c_and_back_gives_identical_logits(tokenizer, changes, tmp_path):
    decoder = make_decoder(**changes)
    to_llama2c(decoder, tokenizer, tmp_path / "model.bin")
    back, tokenizer_back = from_llama2c(tmp_path / "model.bin", llama2c_tokenizer_path(tmp_path / "model.bin"))
    assert back.config == replace(decoder.config, num_kv_heads=decoder.config.kv_heads)
    assert torch.equal(logits(back, random_ids()), logits(decoder, random_ids()))
    text = "Once upon a time, naïve Tom said </s>"
    assert tokenizer_back.encode(text) == tokenizer.encode(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.tokenizer.bin"]


@pytest.mark.parametrize("changes", HUGGING_FACE_VARIANTS)
def test_the_exported_folder_is_the_same_model_in_transformers(tokenizer, changes, tmp_path):
    decoder = make_decoder(**changes)
    to_hugging_face(decoder, tokenizer, tmp_path / "model")
    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    torch.testing.assert_close(logits(model, random_ids()), logits(decoder, random_ids()), rtol=1e-5, atol=1e-5)

    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = theirs("Once upon a time", return_tensors="pt")
    prompt = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    assert inputs["input_ids"][0].tolist() == prompt
    config = GenerationConfig(max_new_tokens=20, temperature=0)
    story = generate(decoder, [prompt], config, tokenizer.eos_id)[0].token_ids
    expected = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=20, do_sample=False
    )
    assert story == expected[0, len(prompt) :].tolist()
    assert len(set(story)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_transformers_wrote_is_the_same_model_here(tokenizer, dtype, tmp_path):
    """In several files, with an index, as larger models come."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        )
    ).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer.save(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    decoder, _ = from_hugging_face(tmp_path)
    # Read again, because a model turned to bfloat16 keeps rounded rotary frequencies.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = logits(model, random_ids())
    torch.testing.assert_close(logits(decoder, random_ids()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_stories260k_decodes_to_the_tokens_that_llama2c_printed(shared, use_cache):
    folder = shared / "models/stories260K"
    golden = json.loads((folder / "golden_once_upon_a_time_n200_ids.json").read_text())
    decoder, tokenizer = from_llama2c(folder / "stories260K.bin", folder / "tok512.bin")
    prompt = [tokenizer.bos_id, *tokenizer.encode(golden["prompt"])]
    assert prompt == golden["prompt_ids"]
    config = GenerationConfig(max_new_tokens=len(golden["all_ids"]) - len(prompt), temperature=0, use_cache=use_cache)
    result = generate(decoder, [prompt], config, tokenizer.eos_id)[0]
    assert prompt + result.token_ids == golden["all_ids"]
    assert tokenizer.decode(prompt + result.token_ids) == golden["text"]


def test_stories260k_exported_again_is_the_same_file(shared, tmp_path):
    folder = shared / "models/stories260K"
    decoder, tokenizer = from_llama2c(folder / "stories260K.bin", folder / "tok512.bin")
    to_llama2c(decoder, tokenizer, tmp_path / "again.bin")
    original, again = (folder / "stories260K.bin").read_bytes(), (tmp_path / "again.bin").read_bytes()
    tables = 512 * 8 * 4  # at the end, computed anew: equal up to rounding
    assert again[:-tables] == original[:-tables]
    ours, theirs = (torch.frombuffer(bytearray(data[-tables:]), dtype=torch.float32) for data in (again, original))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_trained_model_goes_through_both_formats_in_turn(shared, tmp_path):
    folder = shared / "models/stories260K"
    decoder, tokenizer = from_llama2c(folder / "stories260K.bin", folder / "tok512.bin")
    to_hugging_face(decoder, tokenizer, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    golden = json.loads((folder / "golden_once_upon_a_time_n200_ids.json").read_text())
    ids = torch.tensor([golden["prompt_ids"]])
    story = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=len(golden["all_ids"]), do_sample=False)
    assert story[0].tolist() == golden["all_ids"]


HEADER = (48, 64, 2, 6, 2, VOCAB_SIZE, 64)


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (0, -48, "hidden_size=-48"),
        (0, 2**31 - 1, "does not divide"),
        (1, 2**31 - 1, "bytes, but its header asks for"),
        (2, 2**31 - 1, "bytes, but its header asks for"),
        (2, 3, "bytes, but its header asks for"),
        (3, 0, "num_heads=0"),
        (3, 5, "num_heads=5"),
        (4, 4, "num_kv_heads=4"),
        (5, 0, "vocab_size=0"),
        (5, -VOCAB_SIZE, "bytes, but its header asks for"),
        (5, -(2**31), "bytes, but its header asks for"),
        (6, 2**31 - 1, "bytes, but its header asks for"),
        (0, 0x616B3432, "--version 0"),
    ],
)
def test_impossible_llama2c_headers_are_refused(tokenizer, tmp_path, place, value, complaint):
    path = tmp_path / "model.bin"
    to_llama2c(make_decoder(), tokenizer, path)
    data = path.read_bytes()
    assert struct.unpack("<7i", data[:28]) == HEADER
    header = [*HEADER[:place], value, *HEADER[place + 1 :]]
    path.write_bytes(struct.pack("<7i", *header) + data[28:])
    assert_refused(from_llama2c, path, llama2c_tokenizer_path(path), match=complaint)


def test_llama2c_files_that_are_cut_short_or_missing_are_refused(tokenizer, tmp_path):
    path = tmp_path / "model.bin"
    to_llama2c(make_decoder(), tokenizer, path)
    data = path.read_bytes()
    for size in (0, 27, 28, len(data) - 4):
        path.write_bytes(data[:size])
        assert_refused(from_llama2c, path, llama2c_tokenizer_path(path), match="bytes")
    assert_refused(from_llama2c, tmp_path / "none.bin", llama2c_tokenizer_path(path), match="cannot be read")
    path.write_bytes(data)
    assert_refused(from_llama2c, path, path, match="tokenizer")


def test_a_tokenizer_of_another_model_is_refused(tokenizer, tmp_path):
    to_llama2c(make_decoder(), tokenizer, tmp_path / "a.bin")
    other = make_tokenizer(VOCAB_SIZE + 1)
    to_llama2c(make_decoder(VOCAB_SIZE + 1), other, tmp_path / "b.bin")
    assert_refused(from_llama2c, tmp_path / "a.bin", llama2c_tokenizer_path(tmp_path / "b.bin"), match="401 tokens")
    assert_refused(to_llama2c, make_decoder(), other, tmp_path / "c.bin", match="401 tokens")
    assert_refused(to_hugging_face, make_decoder(), other, tmp_path / "c", match="401 tokens")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("changes", [{"rope_theta": 500000.0}, {"rms_norm_eps": 1e-6}, {"query_key_norm": True}])
def test_what_llama2c_has_built_in_is_not_exported_otherwise(tokenizer, changes, tmp_path):
    assert_refused(to_llama2c, make_decoder(**changes), tokenizer, tmp_path / "model.bin", match=next(iter(changes)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", [to_llama2c, to_hugging_face])
def test_a_model_that_no_other_program_knows_is_not_exported(tokenizer, export, tmp_path):
    decoder = make_decoder(value_residual=True, query_key_norm=True)
    assert_refused(export, decoder, tokenizer, tmp_path / "model", match="value_residual=True")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"model_type": "qwen3"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 16},
        {"quantization_config": {"quant_method": "awq"}},
        {"vocab_size": "many"},
        {"vocab_size": 300},
        {"hidden_size": -48},
        {"hidden_size": 10**12},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 0},
        {"max_position_embeddings": 10**12},
        {"rms_norm_eps": "small"},
        {"tie_word_embeddings": False},
    ],
    ids=json.dumps,
)
def test_hugging_face_models_that_the_decoder_cannot_express_are_refused(tokenizer, tmp_path, changes):
    folder = tmp_path / "model"
    to_hugging_face(make_decoder(), tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert_refused(from_hugging_face, folder, match=str(folder))


def test_hugging_face_folders_that_are_damaged_are_refused(tokenizer, tmp_path):
    folder = tmp_path / "model"
    to_hugging_face(make_decoder(), tokenizer, folder)
    path = folder / "model.safetensors"
    weights, data, config = load_file(path), path.read_bytes(), (folder / "config.json").read_text()

    path.write_bytes(data[:-100])
    assert_refused(from_hugging_face, folder, match="safetensors")
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, path)
    assert_refused(from_hugging_face, folder, match=r"q_proj\.bias")
    save_file({name: weight for name, weight in weights.items() if "layers.1.mlp.up" not in name}, path)
    assert_refused(from_hugging_face, folder, match=r"layers\.1\.mlp\.up_proj\.weight is missing")
    path.rename(folder / "pytorch_model.bin")
    assert_refused(from_hugging_face, folder, match=r"no model\.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    assert_refused(from_hugging_face, folder, match="outside")
    (folder / "config.json").write_text(config[:-5])
    assert_refused(from_hugging_face, folder, match="not JSON")
    (folder / "config.json").unlink()
    assert_refused(from_hugging_face, folder, match="cannot be read")


def test_an_export_never_writes_into_a_folder_that_holds_something(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(to_hugging_face, make_decoder(), tokenizer, tmp_path, match="exists already")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_never_overwrites_a_file(tokenizer, tmp_path):
    for name in ("model.bin", "other.tokenizer.bin", "model.gguf"):
        (tmp_path / name).write_text("mine")
    for export, name in ((to_llama2c, "model.bin"), (to_llama2c, "other.bin"), (to_gguf, "model.gguf")):
        assert_refused(export, make_decoder(), tokenizer, tmp_path / name, match="exists already; give a new name")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


def test_a_bfloat16_decoder_is_exported_in_float32(tokenizer, tmp_path):
    decoder = make_decoder().bfloat16()
    to_hugging_face(decoder, tokenizer, tmp_path / "model")
    weights = from_hugging_face(tmp_path / "model")[0].state_dict()
    assert all(torch.equal(weights[name], weight.float()) for name, weight in decoder.state_dict().items())


def run_files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_model_whose_tokenizer_adds_no_bos_tells_what_it_tells_in_transformers(tokenizer, in_tmp):
    to_hugging_face(make_decoder(), tokenizer, in_tmp / "model")
    described = json.loads((in_tmp / "model/tokenizer.json").read_text())
    (in_tmp / "model/tokenizer.json").write_text(json.dumps(described | {"post_processor": None}))
    convert(["import", "model", "run", "--path", "demo"])
    convert(["hugging_face", "run/checkpoints/last.ckpt", "again"])
    common = ["--config=run/config.yaml", "--ckpt_path=last", "--trainer.enable_progress_bar=false"]
    lm(
        [
            "predict",
            *common,
            '--data.prompts=["Once upon a time"]',
            "--model.generation={temperature: 0, max_new_tokens: 9}",
        ]
    )
    told = json.loads(Path("run/predictions.jsonl").read_text())["text"]
    for folder in ("model", "again"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = AutoTokenizer.from_pretrained(folder)
        inputs = theirs("Once upon a time", return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == tokenizer.encode("Once upon a time")
        expected = model.generate(**inputs, max_new_tokens=9, do_sample=False)
        assert told == tokenizer.decode(expected[0].tolist())


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("form", ["hugging_face", "llama2c"])
def test_an_imported_model_validates_predicts_trains_and_is_exported_again(tokenizer, in_tmp, capsys, form):
    decoder = make_decoder(tie_embeddings=False)
    if form == "hugging_face":
        source = in_tmp / "model"
        to_hugging_face(decoder, tokenizer, source)
    else:
        source = in_tmp / "model.bin"
        to_llama2c(decoder, tokenizer, source)
    run = in_tmp / "imported"
    convert(["import", str(source), str(run), "--path", str(write_stories(in_tmp / "stories"))])
    stored, _ = load_checkpoint(run / "checkpoints/last.ckpt")
    assert torch.equal(logits(stored, random_ids()), logits(decoder, random_ids()))

    common = ["--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.enable_progress_bar=false"]
    validated = lm(["validate", *common, "--ckpt_path=best", "--trainer.limit_val_batches=1"])
    assert validated.trainer.callback_metrics["val/loss"] > 0
    lm(["predict", *common, '--data.prompts=["Once upon a time"]', "--model.generation.temperature=0"])
    prompt = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    story = generate(decoder, [prompt], GenerationConfig(temperature=0), tokenizer.eos_id)[0].token_ids
    written = json.loads((run / "predictions.jsonl").read_text())
    assert written["text"] == tokenizer.decode(prompt + story)

    quick = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data.batch_size=2"]
    fitted = lm(["fit", *common, *quick])
    assert fitted.trainer.global_step == 2
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "step-000002.ckpt"}
    trained = fitted.model.decoder.eval()
    assert not torch.equal(logits(trained, random_ids()), logits(decoder, random_ids()))
    # The tokenizer is found through the run's config.yaml.
    if form == "hugging_face":
        convert(["hugging_face", str(run / "checkpoints/last.ckpt"), str(in_tmp / "again")])
        again, _ = from_hugging_face(in_tmp / "again")
    else:
        convert(["llama2c", str(run / "checkpoints/last.ckpt"), str(in_tmp / "again.bin")])
        again, _ = from_llama2c(in_tmp / "again.bin", in_tmp / "again.tokenizer.bin")
    assert torch.equal(logits(again, random_ids()), logits(trained, random_ids()))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["import", "missing.bin", "run", "--tokenizer", "missing"], "missing.bin does not exist"),
        (["import", "missing.bin", "run"], "missing.bin does not exist"),
        (["import", "empty", "run"], "config.json cannot be read"),
        (["hugging_face", "missing.ckpt", "out"], "missing.ckpt"),
        (["llama2c", "broken.ckpt", "out"], "broken.ckpt"),
        (["llama2c", "other.ckpt", "out"], "not a checkpoint of the language model"),
        (["llama2c", "sound.ckpt", "out"], "give it with --tokenizer"),
        (["hugging_face", "sound.ckpt", "out", "--tokenizer", "missing.json"], "missing.json"),
        (["export"], "export"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(in_tmp, capsys, arguments, complaint):
    (in_tmp / "empty").mkdir()
    (in_tmp / "broken.ckpt").write_bytes(b"PK not a checkpoint")
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, in_tmp / "other.ckpt")
    decoder = make_decoder()
    state = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
    hyper_parameters = {"decoder": asdict(decoder.config)}
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters}, in_tmp / "sound.ckpt")
    before = run_files(in_tmp)
    with pytest.raises(SystemExit) as error:
        convert(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert complaint in message
    assert run_files(in_tmp) == before
