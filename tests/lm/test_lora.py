"""LoRA for the decoder, against PEFT on transformers' Llama: one function, one gradient, one course of training."""

import csv
import json
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from experiment.nn.lora_config import LoRAConfig
from lm.__main__ import main as lm
from lm.convert import main as convert
from lm.data.demo_letters import main as letters
from lm.data.demo_stories import demo_texts
from lm.decoding.generation import generate
from lm.formats.adapters import (
    TARGETS,
    adapted,
    base_weights,
    inject,
    inject_peft,
    merged,
    peft_names,
    read_decoder_adapter,
    save_adapter,
    trained_weights,
)
from lm.formats.gguf import from_gguf
from lm.formats.hugging_face import from_hugging_face, to_hugging_face
from lm.formats.llama2c import from_llama2c
from lm.formats.pretrained import load_checkpoint
from lm.model.config import GenerationConfig
from lm.model.decoder import Decoder
from tests.lm.small import VOCAB_SIZE, logits, make_decoder, make_tokenizer, random_ids

# transformers 5.23 deprecates a property that peft 0.21 asks for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie.*"),
    pytest.mark.filterwarnings("ignore:.*embedding layers.*"),
]
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.2}}
EACH = [[target] for target in TARGETS]
EVERY = list(TARGETS)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(VOCAB_SIZE)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Llamas with a tied head and with one of their own, for transformers."""
    folders = {}
    for tied in (True, False):
        folders[tied] = tmp_path_factory.mktemp("llama") / "model"
        to_hugging_face(small(tied), tokenizer, folders[tied])
    return folders


def small(tied: bool = True) -> Decoder:
    decoder = make_decoder(tie_embeddings=tied).train()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim > 1:  # logits of the order of 1, of which 1e-6 is asked
                parameter.mul_(0.05 if name == "head.weight" else 0.25)
    return decoder


def config(targets="all-linear", **changes) -> LoRAConfig:
    return LoRAConfig(**({"r": 4, "lora_alpha": 8, "target_modules": targets, "modules_to_save": []} | changes))


def ours(lora: LoRAConfig, tied: bool = True, by_peft: bool = False) -> Decoder:
    decoder = small(tied)
    torch.manual_seed(1)
    (inject_peft if by_peft else inject)(decoder, lora)
    return decoder


def theirs(folders, lora: LoRAConfig, tied: bool = True) -> peft.PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folders[tied], dtype=torch.float32)
    torch.manual_seed(1)
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    options = {name: getattr(lora, name) for name in names}
    whole = lora.modules_to_save or None
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=whole, **options)).train()


def pairs(decoder: Decoder, model: peft.PeftModel) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    names = peft_names(decoder.config)
    mine = {}
    for key, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            module, dot, rest = key.partition(".lora_")
            if not dot:
                module, _, rest = key.rpartition(".")
                dot = "."
            mine[f"{names[module]}{dot}{rest}"] = parameter
    other = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = key.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            other[key.replace("magnitude_vector.default.weight", "magnitude_vector").replace(".default", "")] = (
                parameter
            )
    assert mine.keys() == other.keys()
    return {key: (mine[key], other[key]) for key in mine}


def stir(decoder: Decoder, model: peft.PeftModel) -> None:
    """Away from B = 0, where half of the gradients vanish."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for mine, other in pairs(decoder, model).values():
            mine += 0.05 * torch.randn(mine.shape, generator=generator)
            other.copy_(mine)


def loss_of(model, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB_SIZE, (2, 13), generator=generator)
    torch.manual_seed(100 + step)  # the dropout masks
    output = model(ids[:, :-1])
    scores = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


def train(model, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [*EACH, EVERY, "all-linear", r".*layers\.1.*(q|up)_proj"], ids=str)
def test_logits_and_gradients_equal_those_of_peft(folders, targets, tied):
    lora = config(targets)
    decoder, model = ours(lora, tied), theirs(folders, lora, tied)
    for mine, other in pairs(decoder, model).values():
        assert torch.equal(mine, other)  # one seed, one A
    stir(decoder, model)
    torch.testing.assert_close(logits(decoder, random_ids()), logits(model, random_ids()), atol=1e-6, rtol=1e-6)
    loss_of(decoder).backward()
    loss_of(model).backward()
    for name, (mine, other) in pairs(decoder, model).items():
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5, msg=name)
        assert mine.grad.abs().max() > 0, name
    assert all(p.grad is None for p in decoder.parameters() if not p.requires_grad)


@pytest.mark.parametrize("by_peft", [False, True], ids=["lora", "peft"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_twenty_steps_end_in_the_losses_and_weights_of_peft(folders, variant, by_peft):
    lora = config(**variant)
    decoder, model = ours(lora, by_peft=by_peft), theirs(folders, lora)
    assert train(decoder, 20) == pytest.approx(train(model, 20), abs=2e-6)
    fresh = ours(lora)
    expected = dict(zip(trained_weights(fresh), (other for _, other in pairs(fresh, model).values()), strict=True))
    assert trained_weights(decoder).keys() == expected.keys()
    for name, mine in trained_weights(decoder).items():
        torch.testing.assert_close(mine, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], EVERY, "all-linear"], ids=str)
@pytest.mark.parametrize("by_peft", [False, True], ids=["lora", "peft"])
def test_merged_equals_unmerged(targets, tied, by_peft):
    lora = config(targets)
    decoder = ours(lora, tied, by_peft)
    train(decoder, 3)
    plain = merged(decoder, lora)
    torch.testing.assert_close(logits(plain, random_ids()), logits(decoder, random_ids()), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(logits(plain, random_ids()), logits(small(tied), random_ids()), atol=1e-5)
    assert type(plain.blocks[0].attention.qkv) is torch.nn.Linear


@pytest.mark.parametrize("by_peft", [False, True], ids=["lora", "peft"])
def test_what_was_there_and_what_was_trained_make_the_adapted_decoder_again(by_peft):
    lora = config(EVERY, modules_to_save=["norm", "input_layernorm"])
    decoder = ours(lora, False, by_peft)
    base = {name: weight.clone() for name, weight in base_weights(decoder).items()}
    train(decoder, 3)
    assert base.keys() == small(False).state_dict().keys()
    assert all(torch.equal(base[key], weight) for key, weight in small(False).state_dict().items())
    again = adapted(decoder.config, base, lora, trained_weights(decoder))
    torch.testing.assert_close(logits(again, random_ids()), logits(decoder, random_ids()), atol=1e-6, rtol=1e-6)


FILES = [
    ({}, "all-linear"),
    ({}, EVERY),
    ({"use_dora": True}, ["q_proj", "up_proj"]),
    ({"use_rslora": True}, ["v_proj"]),
]
FILES.append(({"modules_to_save": ["norm", "embed_tokens"]}, ["k_proj"]))


@pytest.mark.parametrize(("variant", "targets"), FILES, ids=str)
def test_peft_loads_what_we_save(folders, variant, targets, tmp_path):
    lora = config(targets, **variant)
    decoder = ours(lora, tied=False)
    train(decoder, 3)
    save_adapter(decoder, lora, tmp_path, str(folders[False]))
    base = AutoModelForCausalLM.from_pretrained(folders[False], dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(loaded, random_ids()), logits(decoder, random_ids()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("variant", "targets"), FILES, ids=str)
def test_we_load_what_peft_saves(folders, variant, targets, tmp_path):
    model = theirs(folders, config(targets, **variant), tied=False)
    train(model, 3)
    model.save_pretrained(tmp_path)
    decoder = small(False)
    lora, trained = read_decoder_adapter(decoder, tmp_path)
    again = adapted(decoder.config, decoder.state_dict(), lora, trained)
    torch.testing.assert_close(logits(again, random_ids()), logits(model.eval(), random_ids()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 6}, "shape"),
        ({"num_layers": 3}, "lacks"),
        ({"num_layers": 1}, "unknown to this model"),
        ({"tie_embeddings": True, "hidden_size": 96}, "shape"),
    ],
    ids=str,
)
def test_an_adapter_of_another_shape_is_refused(changes, message, tmp_path):
    save_adapter(ours(config(), tied=False), config(), tmp_path)
    with pytest.raises(ValueError, match=message):
        read_decoder_adapter(make_decoder(**{"tie_embeddings": False, **changes}), tmp_path)


@pytest.mark.parametrize("targets", [["query"], ["q_proj", "w1"], "layers", "(", ["self_attn"], ["norm"]], ids=str)
def test_targets_that_match_nothing_are_named_with_those_there_are(targets):
    with pytest.raises(ValueError, match=r"target_modules .*(it has q_proj, .*lm_head|regular expression)"):
        inject(small(), config(targets))


def test_modules_to_save_that_cannot_be_are_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'q_proj'.*input_layernorm"):
        inject(small(), config(modules_to_save=["q_proj"]))
    with pytest.raises(ValueError, match="'embed_tokens'"):  # a tied one is the head, too
        inject(small(), config(modules_to_save=["embed_tokens"]))


TINY = [
    "--data.path=data", "--data.batch_size=2", "--data.sequence_length=32", "--trainer.max_steps=4",
    "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null",
    "--trainer.enable_progress_bar=false", "--samples.every_n_steps=2", "--samples.max_new_tokens=4",
    "--model.optimizer.warmup_steps=1", "--model.optimizer.learning_rate=0.01",
]  # fmt: skip
ADAPTED = [*TINY, "--model.lora.r=4", "--run_dir=run"]


@pytest.fixture
def source(tokenizer, in_tmp):
    """What is adapted, and a few stories to adapt it to."""
    to_hugging_face(make_decoder(), tokenizer, in_tmp / "source")
    stories = demo_texts("validation")
    for split, texts in (("train", stories[:40]), ("validation", stories[40:50])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (in_tmp / f"data/{split}.jsonl").parent.mkdir(exist_ok=True)
        (in_tmp / f"data/{split}.jsonl").write_text(lines)
    return in_tmp / "source"


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("adapter", ["lora", "peft"])
def test_an_adapted_run_is_enough_validates_predicts_resumes_and_is_exported_every_way(source, in_tmp, capsys, adapter):
    fitted = lm(["fit", *ADAPTED, f"--model.init_from={source}", f"--model.adapter={adapter}"])
    expected = fitted.trainer.callback_metrics["val/loss"].item()
    checkpoint = torch.load(in_tmp / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"] and all("lora_" in name for name in checkpoint["state_dict"])
    shutil.rmtree(source)  # the run's folder is enough
    (in_tmp / "run").rename(in_tmp / "moved")

    again = lm(["validate", "--config=moved/config.yaml", "--ckpt_path=last", "--trainer.limit_val_batches=1"])
    assert again.trainer.callback_metrics["val/loss"].item() == pytest.approx(expected, abs=1e-6)
    plain, tokenizer = load_checkpoint(in_tmp / "moved/checkpoints/last.ckpt")
    adapted_logits = logits(fitted.model.decoder.eval(), random_ids())
    torch.testing.assert_close(logits(plain, random_ids()), adapted_logits, atol=2e-5, rtol=1e-5)
    prompts = '--data.prompts=["Once upon a time"]'
    lm(["predict", "--config=moved/config.yaml", "--ckpt_path=last", prompts, "--model.generation.temperature=0"])
    written = json.loads((in_tmp / "moved/predictions.jsonl").read_text())["text"]
    prompt = [tokenizer.bos_id, *tokenizer.encode("Once upon a time")]
    options = GenerationConfig(temperature=0)
    story = generate(plain, [prompt], options, tokenizer.eos_id)[0].token_ids
    assert written == tokenizer.decode(prompt + story)

    # merged, in every format, the same tokens
    convert(["hugging_face", "moved/checkpoints/last.ckpt", "hf"])
    convert(["llama2c", "moved/checkpoints/last.ckpt", "model.bin"])
    convert(["gguf", "moved/checkpoints/last.ckpt", "model.gguf"])
    exported = [from_hugging_face("hf"), from_llama2c("model.bin", "model.tokenizer.bin"), from_gguf("model.gguf")]
    for decoder, _ in exported:
        assert generate(decoder, [prompt], options, tokenizer.eos_id)[0].token_ids == story
    ids = torch.tensor([prompt])
    theirs = AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32)
    generated = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(story), do_sample=False)
    assert generated[0, len(prompt) :].tolist() == story
    # unmerged, for PEFT, and back
    convert(["adapter", "moved/checkpoints/last.ckpt", "adapter"])
    base = AutoModelForCausalLM.from_pretrained("adapter/base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, "adapter").eval()
    torch.testing.assert_close(logits(loaded, random_ids()), adapted_logits, atol=2e-5, rtol=1e-5)
    convert(["import", "adapter/base", "imported", "--path=data", "--adapter=adapter"])
    torch.testing.assert_close(
        logits(load_checkpoint("imported")[0], random_ids()), adapted_logits, atol=2e-5, rtol=1e-5
    )

    resumed = lm(["fit", "--config=moved/config.yaml", "--ckpt_path=last", "--trainer.max_steps=6"])
    assert resumed.trainer.global_step == 6
    begun = [
        "fit", *TINY, "--model.init_from=moved", f"--model.adapter={adapter}", "--model.adapter_weights=adapter",
        "--trainer.max_steps=1", "--samples.every_n_steps=0", "--run_dir=second",
    ]  # fmt: skip
    second = lm(begun)
    assert second.model.lora.r == 4  # the folder's


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_both_adapters_train_alike_and_a_resumed_run_to_the_bit(source, in_tmp):
    losses = {}
    for adapter, flags in (("lora", []), ("peft", []), ("halves", ["--trainer.max_steps=2"])):
        kind = "peft" if adapter == "peft" else "lora"
        options = [
            f"--model.init_from={source}",
            f"--model.adapter={kind}",
            "--model.optimizer.schedule=constant",
            "--samples.every_n_steps=0",
        ]
        args = [*TINY, *options, f"--run_dir={adapter}", "--trainer.log_every_n_steps=1", "--trainer.precision=32-true"]
        lm(["fit", *args, *flags])
        if flags:
            lm(["fit", *args, "--ckpt_path=last"])
        with (in_tmp / adapter / "metrics.csv").open() as file:
            losses[adapter] = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert losses["halves"] == losses["lora"]
    assert [float(loss) for loss in losses["peft"]] == pytest.approx([float(loss) for loss in losses["lora"]], abs=2e-6)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.adapter=lora"], "give --model.init_from"),
        (["--model.init_from=nowhere.gguf"], "nowhere.gguf does not exist"),
        (
            ["--model.init_from=source", "--model.adapter=lora", '--model.lora.target_modules=["query"]'],
            "it has q_p",
        ),
        (["--model.init_from=source", "--model.adapter=lora", "--model.lora.r=0"], "rank"),
        (["--model.init_from=source", "--model.decoder.hidden_size=64"], "the pretrained weights have 48"),
        (["--model.init_from=source", "--model.adapter=lora", "--model.adapter_weights=source"], "adapter_config.json"),
        (["--model.init_from=source", "--model.adapter_weights=source"], "needs model.adapter"),
        (["--model.init_from=source", "--model.adapter=lora", "--model.optimizer.muon_learning_rate=0.1"], "null"),
    ],
    ids=str,
)
def test_bad_input_ends_with_one_line_and_exit_code_2(source, in_tmp, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        lm(["fit", *ADAPTED, *flags])
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not (in_tmp / "run").exists()


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_run_is_validated_before_its_first_step_and_on_a_second_data_set(source, in_tmp):
    (in_tmp / "other").mkdir()
    for split in ("train", "validation"):
        (in_tmp / f"other/{split}.txt").write_text("\n".join(f"{n} plus {n} is {2 * n}." for n in range(30)))
    common = [*TINY, f"--model.init_from={source}", "--trainer.limit_val_batches=1.0"]
    lm(["fit", *common, "--data.second_path=other", "--model.adapter=lora", "--run_dir=run"])
    with (in_tmp / "run/metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["val/loss"]}
    assert list(rows) == [0, 2, 4]
    before = lm(["validate", *common, "--data.second_path=other"]).trainer.callback_metrics
    for name in ("val/loss", "val/second_loss", "val/second_perplexity", "val/second_bits_per_byte"):
        assert float(rows[0][name]) == pytest.approx(before[name].item(), abs=1e-5)
        assert float(rows[0][name]) != float(rows[4][name])
    alone = lm(
        ["validate", *TINY, f"--model.init_from={source}", "--data.path=other", "--trainer.limit_val_batches=1.0"]
    )
    assert alone.trainer.callback_metrics["val/loss"].item() == pytest.approx(
        before["val/second_loss"].item(), abs=1e-5
    )


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_stories260k_learns_another_kind_of_story_in_a_minute(shared, in_tmp):
    folder = shared / "models/stories260K"
    weights = [f"--model.init_from={folder / 'stories260K.bin'}"]
    flags = [
        "--data.path=letters", "--data.sequence_length=256", "--data.packing=true", "--data.batch_size=4",
        "--trainer.max_steps=40", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=40",
        "--trainer.check_val_every_n_epoch=null", "--trainer.enable_progress_bar=false", "--samples.every_n_steps=0",
        "--model.optimizer.learning_rate=0.01", "--model.optimizer.warmup_steps=4", "--run_dir=run",
    ]  # fmt: skip
    letters(["letters"])
    lm(["fit", *weights, *flags, "--model.adapter=lora"])
    with (in_tmp / "run/metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.3, losses
