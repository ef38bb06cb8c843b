"""Only completions are trained on and counted, and stories that share a row do not see each other."""

import json
import re
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiment.nn.hardware import can_compile
from experiment.nn.lora import LoRAConfig
from lm.__main__ import main
from lm.data.completions import encode_stories
from lm.data.corpus import positions_in
from lm.data.demo_stories import demo_texts
from lm.data.module import TextDataModule
from lm.data.tokenizer import StoryTokenizer
from lm.data.tokenizer_files import load_tokenizer
from lm.formats.adapters import inject
from lm.formats.hugging_face import to_hugging_face
from lm.model.decoder import Decoder
from lm.model.loss import summed_loss
from lm.training.module import TokenSums
from tests.lm.small import VOCAB_SIZE, make_decoder, make_tokenizer
from tests.runs import TINY, checkpoint, refused, rows

NAMES = ("Tom", "Anna", "Ben", "Zoë", "Sue")
PAIRS = [
    {"prompt": f"Who has the {thing}?\n", "completion": f"{name} has a {thing}.{' Really.' * i}"}
    for i, name in enumerate(NAMES)
    for thing in ("ball", "big ▁dog 🎉")
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{pair['prompt']} <s>"},
            {"role": "assistant", "content": pair["completion"]},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So it is."},
        ]
    }
    for pair in PAIRS
]
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
)
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}\n"
    "{% endfor %}"
)


def byte_level() -> StoryTokenizer:
    """Like SmolLM's: byte-level BPE, which puts nothing before a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 2, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(demo_texts("validation"), trainer)
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return StoryTokenizer(backend, VOCAB_SIZE - 2, VOCAB_SIZE - 1)


TOKENIZERS = {"llama": make_tokenizer(VOCAB_SIZE), "byte level": byte_level()}
TOKENIZER = TOKENIZERS["llama"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> StoryTokenizer:
    return TOKENIZERS[request.param]


def write(folder: Path, rows: list[dict]) -> str:
    """A source with these rows to train on, and again for validation."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def data_module(folder: Path, tokenizer: StoryTokenizer, rows: list[dict] = PAIRS, **options) -> TextDataModule:
    tokenizer.save(folder / "tokenizer")
    return TextDataModule(
        write(folder / "source", rows), str(folder / "tokenizer"), **{"sequence_length": 32, "batch_size": 3} | options
    )


def mild(**changes) -> Decoder:
    """With logits of the order of 1."""
    decoder = make_decoder(**changes).train()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.25)
    return decoder


def expected_ids(pair: dict, tokenizer: StoryTokenizer) -> tuple[list[int], list[int]]:
    before = [*tokenizer.begins_with, *tokenizer.encode(pair["prompt"])]
    whole = [*tokenizer.begins_with, *tokenizer.encode(pair["prompt"] + pair["completion"]), tokenizer.eos_id]
    assert whole[: len(before)] == before  # the prompts end where a token does
    return before, whole[len(before) :]


def labelled(tokenizer: StoryTokenizer, packing: bool, length: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of rows, as transformers wants them: -100 on the prompts."""
    stories = [expected_ids(pair, tokenizer) for pair in PAIRS]
    stories = [(before + after, [-100] * len(before) + after) for before, after in stories]
    if not packing:
        return [(ids[: length + 1], labels[: length + 1]) for ids, labels in stories]
    ids, labels = ([token for story in part for token in story] for part in zip(*stories, strict=True))
    places = range(0, len(ids) - 1, length)
    return [(ids[i : i + length + 1], labels[i : i + length + 1]) for i in places]


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
def test_loss_is_the_sum_over_the_completions_tokens_as_in_transformers(
    tmp_path: Path, tokenizer: StoryTokenizer, packing: bool
) -> None:
    decoder = mild()
    to_hugging_face(decoder, tokenizer, tmp_path / "llama")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    direct, count = 0.0, 0
    for ids, labels in labelled(tokenizer, packing, 32):
        counted = sum(label != -100 for label in labels[1:])
        if counted:
            with torch.no_grad():
                direct += counted * llama(torch.tensor([ids]), labels=torch.tensor([labels])).loss.double()
            count += counted
    data = data_module(tmp_path, tokenizer, packing=packing)
    data.setup("fit")
    sums = [summed_loss(decoder, batch["tokens"], batch["loss_mask"]) for batch in data.train_dataloader()]
    assert sum(tokens for _, tokens in sums) == count == data.facts["tokens_per_epoch"]
    assert sum(loss.double() for loss, _ in sums).item() == pytest.approx(direct.item(), rel=1e-6)


def test_evaluation_counts_tokens_and_bytes_of_the_completions(tmp_path: Path, tokenizer: StoryTokenizer) -> None:
    data = data_module(tmp_path, tokenizer, sequence_length=16)
    data.setup("validate")
    sums, size = TokenSums(), 0
    for batch in data.val_dataloader():
        losses = torch.ones(batch["loss_mask"].numel())
        sums.update(losses, *(batch[name].flatten() for name in ("loss_mask", "text_mask", "bytes")))
    size = sum(len(pair["completion"].encode()) for pair in PAIRS)
    assert sums.tokens == sum(len(expected_ids(pair, tokenizer)[1]) for pair in PAIRS)
    assert sums.text_loss == (sums.tokens - len(PAIRS)) << 20  # all but eos
    assert sums.bytes == size


def test_prompt_and_completion_joined_come_back_wherever_they_are_cut(tokenizer: StoryTokenizer) -> None:
    text = "Tom said: ▁naïve  🎉 dogs\n run."
    for cut in range(1, len(text)):
        pair = {"prompt": [text[:cut]], "completion": [text[cut:]]}
        (ids,), (learned,) = encode_stories(pair, tokenizer, "here")
        assert tokenizer.decode(ids) == text
        assert ids[: learned.index(True)] == tokenizer.encode_prompt(text[:cut])


def test_story_begins_with_what_the_tokenizer_puts_before_a_text(tmp_path: Path, tokenizer: StoryTokenizer) -> None:
    data = data_module(tmp_path, tokenizer, [{"text": "Tom ran."}])
    data.setup("validate")
    assert data.corpus("validation").tokens.tolist() == [*tokenizer.encode_prompt("Tom ran."), tokenizer.eos_id]


# ------------------------------------------------------------------------------------------------ the document mask


def pieces(row: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """The stories, or parts of them, that share a row."""
    starts = (positions == 0).nonzero().flatten().tolist()
    return [row[begin:end] for begin, end in zip(starts, [*starts[1:], len(row)], strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": None},
        {"query_key_norm": True, "value_residual": True},
        "recompute",
        pytest.param("compiled", marks=pytest.mark.slow),
        "lora",
    ],
    ids=str,
)
def test_packed_row_gives_each_story_its_logits_and_gradients_alone(tmp_path: Path, changes: dict | str) -> None:
    decoder = mild(**({} if isinstance(changes, str) else changes))
    if changes == "lora":
        inject(decoder, LoRAConfig(r=4))
    decoder.recompute = changes == "recompute"
    data = data_module(tmp_path, TOKENIZER, packing=True, document_mask=True)
    data.setup("fit")
    rows = data.train_dataloader().dataset
    batch = rows[range(len(rows) - 1)]  # the last has pads
    inputs, positions = batch["tokens"][:, :-1].long(), batch["positions"]
    alone = [piece for row in zip(inputs, positions, strict=True) for piece in pieces(*row)]
    assert len(alone) > 4 and max(map(len, alone)) > 8
    apart = torch.cat([decoder(piece[None])[0] for piece in alone])
    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    if changes == "compiled":
        if not can_compile("cpu"):
            pytest.skip("no compiler")
        decoder.compile_blocks()
    packed = decoder.logits(decoder.hidden_states(inputs, positions=positions)).flatten(0, 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)
    gradients = (
        torch.autograd.grad(F.cross_entropy(logits, batch["tokens"][:, 1:].long().flatten()), weights)
        for logits in (packed, apart)
    )
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_bfloat16_keeps_stories_apart_too(tmp_path: Path) -> None:
    decoder = mild()
    inputs = torch.randint(VOCAB_SIZE, (1, 16))
    positions = torch.tensor([[*range(5), *range(11)]])
    with torch.autocast("cpu", torch.bfloat16):
        before = decoder.hidden_states(inputs, positions=positions)[:, 5:]
        inputs[:, :5] += 1 - 2 * (inputs[:, :5] == VOCAB_SIZE - 1).long()
        after = decoder.hidden_states(inputs, positions=positions)[:, 5:]
    assert torch.equal(before, after)


def test_document_mask_without_packing_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert "data.document_mask true" in refused(capsys, "fit", "--data.document_mask=true", "--data.path=demo")


# ------------------------------------------------------------------------------------------------- streams and resume


def stories_of(batches: list[dict]) -> list[tuple[list[int], list[bool]]]:
    """The stories of packed rows, each token with whether it is trained on; the first and the last may be cut."""
    tokens = torch.cat([batch["tokens"][:, 1:].flatten() for batch in batches]).tolist()
    learned = torch.cat([batch["loss_mask"].flatten() for batch in batches]).tolist()
    starts = [i for i, token in enumerate(tokens) if token == TOKENIZER.bos_id]
    return [(tokens[a:b], learned[a:b]) for a, b in pairwise(starts)]


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
def test_stream_equals_the_tokenised_corpus(tmp_path: Path, packing: bool) -> None:
    options = {"packing": packing, "document_mask": packing, "batch_size": 2}
    streamed, stored = (
        list(islice(data_module(tmp_path, TOKENIZER, streaming=streaming, **options).train_dataloader(), batches))
        for streaming, batches in ((True, 60 if packing else 5), (False, None))
    )
    if packing:
        for batch in streamed:
            begins = (batch["tokens"][:, :-1] == TOKENIZER.bos_id).numpy()
            assert (batch["positions"].numpy() == positions_in(begins)).all()
        stories = [expected_ids(pair, TOKENIZER) for pair in PAIRS]
        stories = [(before + after, [False] * len(before) + [True] * len(after)) for before, after in stories]
        assert sorted(map(str, stories)) == sorted({str(story) for story in stories_of(streamed)})
    else:
        rows = (
            sorted(row for batch in batches for row in torch.cat((batch["tokens"], batch["loss_mask"]), 1).tolist())
            for batches in (streamed, stored)
        )
        assert next(rows) == next(rows)


@pytest.mark.parametrize("options", [["--data.streaming=true"], ["--trainer.accumulate_grad_batches=2"]], ids=str)
def test_run_resumes_to_the_bit(in_tmp: Path, options: list[str]) -> None:
    source = write(in_tmp / "source", PAIRS)
    arguments = ["fit", f"--data.path={source}", *TINY, "--data.packing=true", "--data.document_mask=true", *options,
                 "--model.optimizer.schedule=constant"]  # fmt: skip
    main([*arguments, "--run_dir=whole", "--trainer.max_steps=12"])
    main([*arguments, "--run_dir=run", "--trainer.max_steps=5"])
    main([*arguments, "--run_dir=run", "--trainer.max_steps=12", "--ckpt_path=last"])
    weights, expected = (checkpoint(Path(run))["state_dict"] for run in ("run", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert rows(Path("run"))[-1]["train/loss"] == rows(Path("whole"))[-1]["train/loss"]


# ----------------------------------------------------------------------------------------------------- conversations


def with_template(tokenizer: StoryTokenizer, template: str, folder: Path) -> StoryTokenizer:
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def test_conversation_is_that_of_transformers(tmp_path: Path, tokenizer: StoryTokenizer) -> None:
    ours = with_template(tokenizer, TEMPLATE, tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    found, learned = encode_stories({"messages": [chat["messages"] for chat in CHATS]}, ours, "here")
    for ids, mask, chat in zip(found, learned, CHATS, strict=True):
        expected = theirs.apply_chat_template(chat["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert ids == expected["input_ids"]
        assert mask == [value == 1 for value in expected["assistant_masks"]]


def test_template_without_marks_trains_what_an_answer_adds(tmp_path: Path, tokenizer: StoryTokenizer) -> None:
    plain = with_template(tokenizer, PLAIN_TEMPLATE, tmp_path / "plain")
    messages = CHATS[0]["messages"]
    ids, learned = plain.encode_conversation(messages)
    answers = [i for i, token in enumerate(learned) if token and not learned[i - 1]]
    assert ids[: answers[1]] == plain.encode_chat(messages[:3])
    assert ids[: answers[0]] == plain.encode_chat(messages[:1])
    text = plain.decode([token for token, counts in zip(ids, learned, strict=True) if counts])
    assert text.split() == f"{messages[1]['content']} {messages[3]['content']}".split()


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["completions", "messages"])
def test_tables_hold_what_json_lines_do(tmp_path: Path, rows: list[dict], ending: str) -> None:
    with_template(TOKENIZER, TEMPLATE, tmp_path / "tokenizer")
    write(tmp_path / "lines", rows)
    (tmp_path / "table").mkdir()
    for split in ("train", "validation"):
        file = tmp_path / "table" / f"{split}{ending}"
        if ending == ".csv":
            texts = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
            Dataset.from_list(texts).to_csv(file)
        else:
            Dataset.from_list(rows).to_parquet(file)
    options = {"tokenizer": str(tmp_path / "tokenizer"), "batch_size": 2, "packing": True}
    lines, table = (TextDataModule(str(tmp_path / name), **options).corpus("train") for name in ("lines", "table"))
    assert lines.tokens.tolist() == table.tokens.tolist()
    assert lines.learned.tolist() == table.learned.tolist()
    left, right = (
        next(iter(TextDataModule(str(tmp_path / name), streaming=True, **options).train_dataloader()))
        for name in ("lines", "table")
    )
    assert torch.equal(left["tokens"], right["tokens"]) and torch.equal(left["loss_mask"], right["loss_mask"])


# -------------------------------------------------------------------------------------------------------- bad inputs


GOOD = PAIRS[0]
TOLD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
BAD = {
    "prompt alone": ([{"prompt": "Hi"}], "", "has a column 'prompt' and no 'completion' .it has prompt.: add it"),
    "completion alone": ([{"completion": "Hi"}], "", "has a column 'completion' and no 'prompt' .it has completion"),
    "empty completion": ([GOOD, {"prompt": "Why?", "completion": " \n"}], "", "an empty completion of the prompt 'Why"),
    "row without completion": ([GOOD, {"prompt": "Why?"}], "", "has an empty completion of the prompt 'Why"),
    "both kinds": ([GOOD | {"text": "Hi"}], "", "has columns of text and prompt with completion"),
    "rows of both kinds": ([GOOD, {"text": "Hi"}], "", "row 2 of .* has no column 'prompt'.* it has text"),
    "rows of both kinds, text first": ([{"text": "Hi"}, GOOD], "", "row 2 of .* has no column 'text'.* it has prompt"),
    "prompt of another kind": ([{"prompt": 3, "completion": "Hi"}], "", "holds 3 .*expected text"),
    "no messages": ([{"messages": "Hi"}], TEMPLATE, "holds 'Hi': expected a list of objects with role and content"),
    "messages without role": ([{"messages": [{"content": "Hi"}]}], TEMPLATE, "expected a list of objects with role"),
    "no assistant": ([{"messages": TOLD[:1]}], TEMPLATE, "a conversation without assistant text"),
    "no template": ([{"messages": TOLD}], "", "data.tokenizer has no chat template"),
    "no Jinja": ([{"messages": TOLD}], "{% for m in %}", "chat template cannot be used"),
    "template that refuses": ([{"messages": TOLD}], "{{ raise_exception('no') }}", "chat template cannot be used"),
    "long prompt": ([{"prompt": "dog " * 40, "completion": "Hi"}] * 3, "", "no completion begins within the|no story"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_refused_in_one_line(
    in_tmp: Path, capsys: pytest.CaptureFixture, case: str, streaming: bool
) -> None:
    rows, template, message = BAD[case]
    with_template(TOKENIZER, template, in_tmp / "tokenizer") if template else TOKENIZER.save(in_tmp / "tokenizer")
    path = write(in_tmp / "source", rows)
    error = refused(
        capsys, "fit", f"--data.path={path}", "--data.tokenizer=tokenizer", *TINY, f"--data.streaming={streaming}",
        "--run_dir=run",
    )  # fmt: skip
    assert re.search(message, error), error


def test_messages_train_no_tokenizer(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(in_tmp / "source", CHATS)
    assert "give --data.tokenizer one that has a chat template" in refused(capsys, "fit", f"--data.path={path}", *TINY)
