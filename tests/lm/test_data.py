"""The data module: no token lost or invented, targets aligned, pads told by position, evaluation exact."""

import json
import os
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiment.errors import InputError
from lm.data.bpe import train_tokenizer
from lm.data.corpus import Corpus, WindowBatches, first_windows, packed_windows, sliding_windows
from lm.data.demo_stories import demo_texts
from lm.data.module import TextDataModule
from lm.data.prompts import read_prompts
from lm.data.source import StorySource, write_corpus
from tests.windows import unpacked

STORIES = demo_texts("validation")[:60]
TOKENIZER = train_tokenizer(demo_texts("validation"), 500)
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def jsonl(path: Path, texts: list) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    return str(folder)


@pytest.fixture
def source(tmp_path) -> Path:
    """Twenty stories to train on and six very different in length for validation."""
    folder = tmp_path / "source"
    folder.mkdir()
    jsonl(folder / "train.jsonl", STORIES[:20])
    long = " ".join(STORIES[20:24])
    jsonl(folder / "validation.jsonl", ["Hi.", long, STORIES[24], "A", STORIES[25], long + long])
    return folder


@pytest.fixture
def module(source, tokenizer_folder):
    def make(**options) -> TextDataModule:
        return TextDataModule(**{"path": str(source), "tokenizer": tokenizer_folder, "batch_size": 4} | options)

    return make


def story_ids(folder: Path, split: str) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [[BOS, *TOKENIZER.encode(text), EOS] for text in texts]


def rows(loader, *names: str) -> list[tuple]:
    """All rows of all batches as tuples of lists."""
    return [row for batch in loader for row in zip(*(unpacked(batch)[name].tolist() for name in names), strict=True)]


def counted(loader, *names: str) -> list:
    """(input, target, ...) of all positions that count, over all batches."""
    return [
        position
        for ids, targets, weights, *more in rows(loader, "input_ids", "targets", "loss_mask", *names)
        for *position, weight in zip(ids, targets, *more, weights, strict=True)
        if weight
    ]


# ----------------------------------------------------------------------------------------------- windows, in general


class Written(Corpus):
    """A corpus in memory, for the windows alone."""

    def __init__(self, stories: list[list[int]]) -> None:
        self.tokens = np.array([token for story in stories for token in story], dtype=np.uint16)
        self.offsets = np.cumsum([0, *map(len, stories)])
        self.learned = None


# Tokens of stories between bos and eos; 2 is eos and pad too, and 7 turns up often.
some_stories = st.lists(
    st.lists(st.integers(3, 9), max_size=40).map(lambda tokens: [BOS, *tokens, EOS]), min_size=1, max_size=12
)
lengths = st.integers(2, 12)


@settings(max_examples=200, deadline=None)
@given(stories=some_stories, length=lengths)
def test_packing_loses_and_invents_no_token_and_aligns_targets(stories, length):
    corpus = Written(stories)
    windows = packed_windows(len(corpus.tokens), length)
    batch = unpacked(WindowBatches(corpus, windows, TOKENIZER, length)[list(range(len(windows.start)))])
    assert batch["input_ids"].shape == batch["targets"].shape == batch["loss_mask"].shape
    assert batch["input_ids"].shape[1] == length
    counts = batch["loss_mask"].flatten().bool()
    stream = corpus.tokens.tolist()
    assert batch["targets"].flatten()[counts].tolist() == stream[1:]
    assert batch["input_ids"].flatten()[counts].tolist() == stream[:-1]
    assert counts[: int(counts.sum())].all()  # pads stand at the very end only


@settings(max_examples=200, deadline=None)
@given(stories=some_stories, length=lengths)
def test_full_evaluation_predicts_each_token_exactly_once(stories, length):
    corpus = Written(stories)
    windows = sliding_windows(corpus.offsets, length)
    data = WindowBatches(corpus, windows, TOKENIZER, width=None)
    seen = np.zeros(len(corpus.tokens), dtype=int)
    for i in range(len(data)):
        batch = unpacked(data[[i]])
        assert batch["input_ids"].shape[1] <= length
        begin = int(windows.start[i])
        for j in batch["loss_mask"][0].nonzero().flatten().tolist():
            place = begin + j + 1
            seen[place] += 1
            assert batch["targets"][0, j] == corpus.tokens[place]
            story = np.searchsorted(corpus.offsets, place, side="right") - 1
            before = batch["input_ids"][0, : j + 1].tolist()  # what it is predicted from: this story alone
            assert before == corpus.tokens[begin:place].tolist()
            assert begin >= corpus.offsets[story]
            since_bos = place - corpus.offsets[story]
            assert len(before) == since_bos if begin == corpus.offsets[story] else len(before) > length - length // 2
    expected = np.ones(len(corpus.tokens), dtype=int)
    expected[corpus.offsets[:-1]] = 0  # bos is given, not predicted
    assert (seen == expected).all()


@settings(max_examples=100, deadline=None)
@given(stories=some_stories, length=lengths)
def test_report_windows_are_the_first_tokens_of_each_story(stories, length):
    corpus = Written(stories)
    windows = first_windows(corpus.offsets, length)
    batch = unpacked(WindowBatches(corpus, windows, TOKENIZER, length)[list(range(len(stories)))])
    for i, story in enumerate(stories):
        counts = batch["loss_mask"][i].bool()
        assert batch["input_ids"][i][counts].tolist() == story[:-1][:length]
        assert batch["targets"][i][counts].tolist() == story[1:][:length]


# -------------------------------------------------------------------------------------------------- the data module


def test_unpacked_rows_are_the_stories_cut_or_padded(module, source):
    data = module(sequence_length=100)
    data.setup("fit")
    found = sorted(rows(data.train_dataloader(), "input_ids", "targets", "loss_mask"))
    expected = []
    for story in story_ids(source, "train"):
        inputs, targets = story[:-1][:100], story[1:][:100]
        pads = 100 - len(inputs)
        pad = [TOKENIZER.pad_id] * pads
        expected.append((inputs + pad, targets + pad, [1.0] * len(inputs) + [0.0] * pads))
    assert found == sorted(expected)


def test_pads_are_told_by_position_and_eos_is_learnt_although_pad_is_eos(module, source):
    assert TOKENIZER.pad_id == EOS
    data = module(sequence_length=2_000)
    data.setup("fit")
    targets = [target for _, target in counted(data.train_dataloader())]
    assert targets.count(EOS) == 20  # one of each story
    assert len(targets) == sum(len(story) - 1 for story in story_ids(source, "train"))


def test_packed_epoch_holds_every_token_of_the_corpus(module, source):
    data = module(sequence_length=64, packing=True)
    data.setup("fit")
    stream = [token for story in story_ids(source, "train") for token in story]
    pairs = counted(data.train_dataloader())
    assert sorted(pairs) == sorted(map(list, pairwise(stream)))


def test_epoch_with_beginnings_is_all_text_and_each_beginning_once_more(module, source):
    def epoch(**options) -> list:
        data = module(sequence_length=48, **options)
        data.setup("fit")
        return counted(data.train_dataloader())

    expected = epoch(packing=True) + epoch(packing=False)
    assert sorted(epoch(packing=True, extra_first_windows=True)) == sorted(expected)


def test_beginnings_end_the_first_epoch_and_begin_the_second(module, source):
    data = module(sequence_length=48, packing=True, extra_first_windows=True, batch_size=1)
    data.setup("fit")
    loader = data.train_dataloader()
    starts = {tuple(story[:4]) for story in story_ids(source, "train")}
    first, second = ([tuple(batch["tokens"][0, :4].tolist()) in starts for batch in loader] for _ in range(2))
    assert all(first[-20:]) and all(second[:20])  # 20 stories
    assert not all(first[:20]) and not all(second[-20:])


@pytest.mark.parametrize("evaluation", ["full", "first_window"])
def test_evaluation_does_not_depend_on_batch_size(module, evaluation):
    results = []
    for size in (1, 3, 64):
        data = module(sequence_length=48, eval_batch_size=size, evaluation=evaluation)
        data.setup("validate")
        results.append(sorted(counted(data.val_dataloader(), "text_mask", "bytes")))
    assert results[0] == results[1] == results[2]


def test_full_evaluation_covers_every_story_and_every_byte_of_text(module, source):
    data = module(sequence_length=48)
    data.setup("validate")
    stories = story_ids(source, "validation")
    found = counted(data.val_dataloader(), "text_mask", "bytes")
    assert sorted(target for _, target, _, _ in found) == sorted(token for story in stories for token in story[1:])
    texts = [json.loads(line)["text"] for line in (source / "validation.jsonl").read_text().splitlines()]
    assert sum(size for *_, size in found) == sum(len(text.encode()) for text in texts)
    assert sum(weight for _, _, weight, _ in found) == sum(len(story) - 2 for story in stories)  # no bos, no eos
    assert all(weight == 0 and size == 0 for _, target, weight, size in found if target == EOS)


def test_report_evaluation_counts_the_first_tokens_only(module, source):
    data = module(sequence_length=48, evaluation="first_window")
    data.setup("validate")
    expected = sorted(token for story in story_ids(source, "validation") for token in story[1:49])
    assert sorted(target for _, target in counted(data.val_dataloader())) == expected


def test_evaluation_is_the_same_whether_training_packs_or_not(module):
    results = []
    for packing in (False, True):
        data = module(sequence_length=48, packing=packing)
        data.setup("validate")
        results.append(counted(data.val_dataloader()))
    assert results[0] == results[1]


def test_order_depends_on_seed_and_epoch_and_nothing_else(module):
    def order(seed: int, epoch: int) -> list:
        data = module(sequence_length=32, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.epoch = epoch
        return rows(loader, "input_ids")

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert sorted(order(1, 0)) == sorted(order(2, 1))


def test_workers_give_the_same_batches(module):
    found = []
    for workers in (0, 1):
        data = module(sequence_length=32, num_workers=workers)
        data.setup("fit")
        found.append(rows(data.train_dataloader(), "input_ids", "targets", "loss_mask"))
    assert found[0] == found[1]


def test_resumed_epoch_goes_on_where_it_stopped(module):
    data = module(sequence_length=32)
    data.setup("fit")
    whole = rows(data.train_dataloader(), "input_ids")
    again = module(sequence_length=32)
    again.setup("fit")
    again.load_state_dict({"epoch": 0, "batches_done": 2})
    assert rows(again.train_dataloader(), "input_ids") == whole[2 * 4 :]


def test_processes_share_evaluation_without_losing_or_doubling(module, monkeypatch):
    data = module(sequence_length=48, eval_batch_size=2)
    data.setup("validate")
    alone = sorted(counted(data.val_dataloader()))
    shares = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares += counted(data.val_dataloader())
    assert sorted(shares) == alone


# --------------------------------------------------------------------------------------------------- cache, sources


def test_second_start_reads_the_cache_and_not_the_texts(module, monkeypatch):
    def batches() -> list:
        data = module(sequence_length=40)
        data.setup("fit")
        return rows(data.train_dataloader(), "input_ids") + rows(data.val_dataloader(), "input_ids")

    first = batches()
    monkeypatch.setattr("lm.data.source.load_texts", None)
    assert batches() == first


def test_cache_follows_the_source_and_the_tokenizer(module, source, tmp_path):
    first = module().corpus("train")
    assert module(sequence_length=7, packing=True).corpus("train").folder == first.folder  # settings do not matter
    other = tmp_path / "other"
    train_tokenizer(STORIES, 400).save(other)
    assert module(tokenizer=str(other)).corpus("train").folder != first.folder
    jsonl(source / "train.jsonl", STORIES[:30])
    changed = module().corpus("train")
    assert changed.folder != first.folder
    assert len(changed.offsets) == 31


def test_killed_tokenising_leaves_nothing_behind(module, source, monkeypatch):
    jsonl(source / "train.jsonl", STORIES[30:50])

    def killed(*_):
        raise KeyboardInterrupt

    data = module()
    with monkeypatch.context() as patch:
        patch.setattr(data.tokenizer, "encode_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            data.corpus("train")
    assert len(module().corpus("train").offsets) == 21


def test_corpus_is_the_same_whatever_the_chunks(tmp_path, monkeypatch):
    texts = datasets.Dataset.from_dict({"text": STORIES})
    for chunk in (7, 1000):
        monkeypatch.setattr("lm.data.source.CHUNK", chunk)
        (tmp_path / str(chunk)).mkdir()
        write_corpus(texts, TOKENIZER, tmp_path / str(chunk), "test")
    one, other = Corpus(tmp_path / "7"), Corpus(tmp_path / "1000")
    assert (one.tokens == other.tokens).all()
    assert (one.offsets == other.offsets).all()
    assert one.tokens.dtype == np.uint16
    third = one.tokens[one.offsets[2] : one.offsets[3]].tolist()
    assert third == [BOS, *TOKENIZER.encode(STORIES[2]), EOS]


def test_trained_tokenizer_is_cached_and_sets_the_vocabulary(source):
    data = TextDataModule(str(source), "train", vocab_size=400)
    assert data.num_tokens == 400
    assert TextDataModule(str(source), "train", vocab_size=400).tokenizer.fingerprint == data.tokenizer.fingerprint
    assert TextDataModule(str(source), "train", vocab_size=401).num_tokens == 401


def test_source_without_validation_holds_out_training_stories(tmp_path, tokenizer_folder, capsys):
    jsonl(tmp_path / "train.jsonl", STORIES)
    data = TextDataModule(str(tmp_path), tokenizer_folder)
    data.setup("fit")
    assert f"{len(STORIES) // 10} of its {len(STORIES)} texts held out" in " ".join(capsys.readouterr().out.split())
    train, validation = data.corpus("train"), data.corpus("validation")

    def texts(corpus: Corpus) -> set[str]:
        ends = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
        return {TOKENIZER.decode(corpus.tokens[begin:end].tolist()) for begin, end in ends}

    assert len(texts(validation)) == len(STORIES) // 10
    assert not texts(train) & texts(validation)
    assert texts(train) | texts(validation) == set(STORIES)
    other_seed = TextDataModule(str(tmp_path), tokenizer_folder, seed=7)
    assert texts(other_seed.corpus("validation")) == texts(validation)


def test_source_without_test_split_is_tested_on_validation(module, capsys):
    data = module()
    data.setup("test")
    assert "validation is used instead" in capsys.readouterr().out
    data.setup("validate")
    assert counted(data.test_dataloader()) == counted(data.val_dataloader())


def test_empty_stories_are_left_out_and_counted(tmp_path, tokenizer_folder, capsys):
    jsonl(tmp_path / "train.jsonl", [STORIES[0], "", None, " \n", STORIES[1]])
    jsonl(tmp_path / "validation.jsonl", [STORIES[2]])
    data = TextDataModule(str(tmp_path), tokenizer_folder)
    data.setup("fit")
    assert len(data.corpus("train").offsets) == 3
    assert "3 empty stories left out" in capsys.readouterr().out


def test_one_long_text_is_trained_on_and_its_end_held_out(tmp_path, tokenizer_folder, capsys):
    lines = [f"Line {i} of the poem, and no line is blank." for i in range(200)]
    (tmp_path / "poem.txt").write_text("\n".join(lines) + "\n")
    data = TextDataModule(str(tmp_path / "poem.txt"), tokenizer_folder)
    data.setup("fit")
    train, validation = (TOKENIZER.decode(data.corpus(split).tokens.tolist()) for split in ("train", "validation"))
    assert f"{train}{validation}" == "\n".join(lines)
    assert validation.startswith("\nLine 18")
    printed = capsys.readouterr().out
    for note in ("read as one text", "last tenth", "note: only the first 128 tokens", "packing true"):
        assert printed.count(note) == 1


@pytest.mark.parametrize(
    ("stories", "held", "few"),
    [(5, 1, True), (209, 20, True), (210, 21, False), (5_000, 100, False), (20_000, 200, False)],
)
def test_a_tenth_is_held_out_but_at_most_100_or_one_in_100_and_few_are_said_to_be(tmp_path, stories, held, few):
    jsonl(tmp_path / "train.jsonl", [f"Story {i}." for i in range(stories)])
    _, note = StorySource(str(tmp_path), None, streaming=False).texts("validation")
    assert f"{held} of its {stories:,} texts held out" in note and ("too few" in note) == few


def test_corpus_that_yields_few_tokens_gives_what_it_yields(tmp_path, capsys):
    jsonl(tmp_path / "train.jsonl", ["Tom has a red ball and the dog has it too."] * 400)
    data = TextDataModule(str(tmp_path), "train", vocab_size=500)
    assert 259 < data.num_tokens < 323
    assert f"yield only {data.num_tokens}" in capsys.readouterr().out
    assert TextDataModule(str(tmp_path), "train", vocab_size=280).num_tokens == 280


def test_line_separators_within_a_prompt_do_not_end_it(module, tmp_path):
    (tmp_path / "p.txt").write_text("One\u2028two\x85\x0cthree\r\nFour", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt")) == ["One\u2028two\x85\x0cthree", "Four"]


@pytest.mark.parametrize("kind", ["list", "jsonl"])
def test_half_a_character_in_a_prompt_is_replaced(module, tmp_path, kind):
    (tmp_path / "p.jsonl").write_text(r'{"prompt": "Tom \ud83d ran"}')
    prompts = ["Tom \ud83d ran"] if kind == "list" else str(tmp_path / "p.jsonl")
    (batch,) = module(prompts=prompts).predict_dataloader()
    assert batch["prompts"] == ["Tom \ufffd ran"]


def test_prompt_that_is_longer_than_a_file_name_is_no_file(module):
    with pytest.raises(InputError, match="is not a file") as error:
        module(prompts="Once upon a time. " * 300).predict_dataloader()
    assert len(str(error.value)) < 300


def test_demo_corpus_needs_nothing(tokenizer_folder):
    data = TextDataModule("demo", tokenizer_folder, sequence_length=64)
    data.setup("validate")
    assert len(data.corpus("validation").offsets) == 501


# -------------------------------------------------------------------------------------------------- prompts, errors


def test_prompts_of_a_list_and_of_files_are_batched_in_order(module, tmp_path):
    prompts = ["Once upon a time", "Lily", "The big dog", 'He said "no"', "Tom and"]
    (tmp_path / "p.txt").write_text("\n".join([*prompts[:2], "", *prompts[2:]]) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt, "id": 1}) + "\n" for prompt in prompts))
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    for given_prompts in (prompts, *(str(tmp_path / f"p.{ending}") for ending in ("txt", "jsonl", "json"))):
        data = module(prompts=given_prompts, eval_batch_size=2)
        data.setup("predict")
        batches = list(data.predict_dataloader())
        assert [len(batch["prompts"]) for batch in batches] == [2, 2, 1]
        assert [prompt for batch in batches for prompt in batch["prompts"]] == prompts
        ids = [row for batch in batches for row in batch["input_ids"]]
        assert ids == [[BOS, *TOKENIZER.encode(prompt)] for prompt in prompts]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), ("", "is empty"), ("\n\n", "is empty"), ("p.json:{", "cannot be read"),
     ("p.jsonl:[1]", "cannot be read|holds"), ('p.jsonl:{"text": 1}', "holds"), ("p.json:[3]", "holds 3"),
     ("p.json:5", "holds 5")],
)  # fmt: skip
def test_bad_prompt_files_are_refused(module, tmp_path, content, message):
    name, _, content_of_json = (content or "").partition(":") if content and content[0] == "p" else ("", "", "")
    file = tmp_path / (name or "p.txt")
    if content is not None:
        file.write_text(content_of_json if name else content)
    with pytest.raises(InputError, match=message) as error:
        module(prompts=str(file)).predict_dataloader()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompts", [None, []])
def test_missing_prompts_are_refused(module, prompts):
    with pytest.raises(InputError, match="prompts"):
        module(prompts=prompts).predict_dataloader()


@pytest.mark.parametrize(
    ("option", "value"),
    [("sequence_length", 1), ("batch_size", 0), ("eval_batch_size", 0), ("num_workers", -1), ("seed", -1),
     ("evaluation", "half")],
)  # fmt: skip
def test_values_out_of_range_are_refused(module, option, value):
    with pytest.raises(InputError, match=f"data.{option} .*{value}"):
        module(**{option: value})


@pytest.mark.parametrize("options", [{"packing": False}, {"packing": True, "streaming": True}])
def test_beginnings_are_refused_where_they_would_be_dropped(module, options):
    with pytest.raises(InputError, match=r"data\.extra_first_windows true"):
        module(extra_first_windows=True, **options)


def test_sources_that_cannot_be_used_are_refused(tmp_path, tokenizer_folder):
    def folder(name: str, content: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(content)
        return tmp_path / name

    sources = [
        tmp_path / "missing",
        folder("void", ""),
        folder("column", '{"story": "x"}\n{"story": "y"}\n'),
        folder("blank", '{"text": ""}\n{"text": " "}\n{"text": ""}\n'),
        folder("numbers", '{"text": 1}\n{"text": 2}\n{"text": 3}\n'),
        folder("one", '{"text": "only one"}\n'),
        "nobody/no-such-stories",
    ]
    for source in sources:
        with pytest.raises(InputError) as error:
            TextDataModule(str(source), tokenizer_folder).setup("fit")
        assert "\n" not in str(error.value)


def test_real_stories_are_read(shared):
    if not os.access(shared / "data/tinystories/validation.parquet", os.R_OK):
        pytest.skip("the real stories cannot be read")
    data = TextDataModule(
        str(shared / "data/tinystories"), str(shared / "tokenizers/mistral-v3-32768"), evaluation="first_window"
    )
    data.setup("validate")
    batch = unpacked(next(iter(data.val_dataloader())))
    assert data.num_tokens == 32768
    assert batch["input_ids"].shape == (64, 128)
    assert (batch["input_ids"][:, 0] == 1).all()
    assert len(data.corpus("validation").offsets) == 2001
