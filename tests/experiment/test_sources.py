"""Every source of texts reads the same, and what cannot be read is answered with one clear line."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pytest
from huggingface_hub import constants

from experiment.errors import InputError
from experiment.hub import look_for_hub
from experiment.sources import load_texts, source_fingerprint
from tests.runs import free_port

TEXTS = ["One day, a cat sat.", "Two dogs ran, and\nran.", 'She said "hi".']


def write(folder: Path, ending: str, split: str = "train") -> Path:
    file = folder / f"{split}{ending}"
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "extra": [1, 2, 3]})
    if ending == ".parquet":
        dataset.to_parquet(file)
    elif ending == ".csv":
        dataset.to_csv(file)
    elif ending == ".txt":
        file.write_text("\n<|endoftext|>\n".join(TEXTS))
    else:
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".json", ".jsonl", ".txt"])
def test_every_format_gives_the_same_texts(tmp_path: Path, ending: str) -> None:
    write(tmp_path, ending)
    dataset = load_texts(str(tmp_path), "train")
    assert list(dataset["text"]) == TEXTS
    assert dataset.column_names == ["text"]


def test_text_file_without_separators_is_one_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\ntwo\n")
    assert list(load_texts(str(tmp_path / "train.txt"), "train")["text"]) == ["one", "two"]


def test_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, ".txt")
    load_texts(str(file), "train")
    file.write_text("new\n<|endoftext|>\nstories")
    assert list(load_texts(str(file), "train")["text"]) == ["new", "stories"]


def test_split_that_a_folder_lacks_is_none(tmp_path: Path) -> None:
    write(tmp_path, ".jsonl")
    assert load_texts(str(tmp_path), "validation") is None


def test_valid_and_val_are_validation(tmp_path: Path) -> None:
    write(tmp_path, ".jsonl")
    write(tmp_path, ".jsonl", "valid")
    assert len(load_texts(str(tmp_path), "validation")) == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "does not exist"),
        ("nowhere.parquet", "does not exist"),
        ("nobody/there-is-no-such-data-set", "cannot be had from the hub"),
    ],
)
def test_source_that_cannot_be_had_is_refused(path: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_texts(path, "train")
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_hub_without_a_connection_is_not_tried_again_and_one_that_answers_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # says that it can't, which is an answer
        Thread(target=server.handle_request).start()
        for port, offline in ((server.server_port, False), (free_port(), True)):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
            look_for_hub.cache_clear()
            look_for_hub()
            assert constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE == offline
    look_for_hub.cache_clear()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b"", "is empty"),
        ("train.parquet", b"PAR1 this is no parquet file", "cannot be read as parquet"),
        ("train.jsonl", b'{"text": "cut off', "cannot be read as json"),
        ("train.jsonl", b'{"story": "x"}\n', "no column 'text'"),
        ("train.md", b"x", "holds no train"),
    ],
)
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_texts(str(tmp_path), "train")
    assert "\n" not in str(error.value)


def test_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl")
    before = source_fingerprint(str(tmp_path))
    assert source_fingerprint(str(tmp_path)) == before
    file.write_text(file.read_text() + json.dumps({"text": "more"}) + "\n")
    assert source_fingerprint(str(tmp_path)) != before
