"""Stories streamed from a source: none lost, none doubled, shared among readers, resumed at the very batch."""

import json
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from experiment.errors import InputError
from lm.data import streaming
from lm.data.bpe import train_tokenizer
from lm.data.demo_stories import demo_texts
from lm.data.module import TextDataModule
from lm.data.streaming import StoryStream, StreamProgress
from tests.windows import unpacked

TEXTS = [text.replace("\n", " ")[: 30 + 7 * i].strip() for i, text in enumerate(demo_texts("validation")[:23])]
TOKENIZER = train_tokenizer(demo_texts("validation"), 500)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 5)


def write(folder: Path, ending: str) -> str:
    file = folder / f"train{ending}"
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "extra": list(range(len(TEXTS)))})
    if ending == ".parquet":
        dataset.to_parquet(file, batch_size=4)
    elif ending == ".csv":
        dataset.to_csv(file)
    elif ending == ".txt":
        file.write_text("\n<|endoftext|>\n".join(TEXTS))
    else:
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(folder)


def stream(path: str, *, packing: bool = False, batch_size: int = 1, length: int = 400, **options) -> StoryStream:
    return StoryStream(path, TOKENIZER, length, batch_size, packing, seed=3, **options)


def story_of(batch: dict) -> list[int]:
    batch = unpacked(batch)
    counted = int(batch["loss_mask"].sum())
    return [*batch["input_ids"][0, :counted].tolist(), int(batch["targets"][0, counted - 1])]


def ids(text: str) -> list[int]:
    return [TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_an_epoch_of_all_readers_holds_every_story_once(tmp_path: Path, shares: int) -> None:
    path = write(tmp_path, ".jsonl")
    found = []
    for rank in range(shares):
        for batch in stream(path, rank=rank, processes=shares):
            if batch["position"]["epoch"] > 0:
                break
            found.append(story_of(batch))
    assert sorted(found) == sorted(map(ids, TEXTS))


def test_packed_stream_loses_and_invents_no_token(tmp_path: Path) -> None:
    source = stream(write(tmp_path, ".jsonl"), packing=True, batch_size=2, length=16)
    batches = list(map(unpacked, islice(source, 60)))
    inputs = torch.cat([batch["input_ids"].flatten() for batch in batches])
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    assert torch.equal(inputs[1:], targets[:-1])
    assert all(batch["loss_mask"].all() for batch in batches)
    flat, stories = inputs.tolist(), []
    while TOKENIZER.eos_id in flat:
        end = flat.index(TOKENIZER.eos_id) + 1
        stories.append(flat[:end])
        flat = flat[end:]
    assert sorted(stories[: len(TEXTS)]) == sorted(map(ids, TEXTS))  # the first epoch


def test_order_changes_with_the_epoch(tmp_path: Path) -> None:
    found = [story_of(batch) for batch in islice(stream(write(tmp_path, ".jsonl")), 2 * len(TEXTS))]
    first, second = found[: len(TEXTS)], found[len(TEXTS) :]
    assert sorted(first) == sorted(second)
    assert first != second


def equal(left: dict, right: dict) -> bool:
    return all(torch.equal(left[name], right[name]) for name in ("tokens", "loss_mask"))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl", ".txt"])
def test_stream_resumes_at_every_batch(tmp_path: Path, ending: str, packing: bool) -> None:
    path, options = write(tmp_path, ending), {"packing": packing, "batch_size": 2, "length": 24}
    whole = list(islice(stream(path, **options), 40))
    for done in (1, 2, 5, 11, 12, 20, 33):
        progress = StreamProgress()
        for batch in whole[:done]:
            progress.begin(dict(batch))
        state = json.loads(json.dumps(progress.state(processed=True)))
        state["positions"] = {int(reader): position for reader, position in state["positions"].items()}
        resumed = StreamProgress()
        resumed.load(state)
        again = list(islice(stream(path, progress=resumed, **options), 40 - done))
        assert all(map(equal, again, whole[done:])), done


def test_batch_that_was_begun_and_not_done_comes_again(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl")
    whole = list(islice(stream(path), 6))
    progress, resumed = StreamProgress(), StreamProgress()
    for batch in whole[:4]:
        progress.begin(dict(batch))
    resumed.load(progress.state(processed=False))
    assert equal(next(iter(stream(path, progress=resumed))), whole[3])


def test_workers_share_the_stream_and_resume_in_turn(tmp_path: Path) -> None:
    def batches(progress: StreamProgress, count: int) -> list[dict]:
        loader = DataLoader(
            stream(path, progress=progress), batch_size=None, num_workers=2, collate_fn=dict, prefetch_factor=1
        )
        return [{k: v.clone() if hasattr(v, "clone") else v for k, v in b.items()} for b in islice(loader, count)]

    path = write(tmp_path, ".jsonl")
    whole = batches(StreamProgress(), 30)
    assert [batch["reader"] for batch in whole[:4]] == [0, 1, 0, 1]
    progress, resumed = StreamProgress(), StreamProgress()
    for batch in whole[:7]:
        progress.begin(dict(batch))
    resumed.load(progress.state(processed=True))
    assert all(map(equal, batches(resumed, 23), whole[7:]))


def test_source_without_stories_or_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(InputError, match="no story"):
        next(iter(stream(str(tmp_path))))
    (tmp_path / "train.jsonl").write_text('{"story": "x"}\n')
    with pytest.raises(InputError, match="no column 'text'"):
        next(iter(stream(str(tmp_path))))


def test_streaming_needs_a_validation_split(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    data = TextDataModule(write(tmp_path, ".jsonl"), str(tmp_path / "tokenizer"), streaming=True)
    with pytest.raises(InputError, match="no validation split"):
        data.setup("fit")
