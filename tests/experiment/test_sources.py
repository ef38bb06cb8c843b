"""Every source of texts reads the same, and what cannot be read is answered with one clear line."""

import bz2
import gzip
import json
import lzma
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import datasets
import pytest
from huggingface_hub import constants

from experiment.errors import InputError
from experiment.sources.files import load_texts, local_files, source_fingerprint
from experiment.sources.hub import look_for_hub, newest_revision
from experiment.sources.rows import layout_note
from experiment.sources.streams import stream_texts
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


@pytest.mark.parametrize(
    ("content", "texts", "note"),
    [
        ("one\ntwo\n", ["one\ntwo"], "read as one text"),
        ("\nOne\nspeech.\n\n \nTwo\u2028speech.\r\n", ["One\nspeech.", "Two\u2028speech."], "a blank line ends"),
        ("One.\n\nStill one.\n<|endoftext|>\n\nTwo.\n<|endoftext|>\n", ["One.\n\nStill one.", "Two."], ""),
        (f"{'A long story. ' * 100_000}<|endoftext|>Two.", [("A long story. " * 100_000).strip(), "Two."], ""),
    ],
)
def test_text_file_is_divided_by_end_markers_or_blank_lines_or_not_at_all(
    tmp_path: Path, content: str, texts: list[str], note: str
) -> None:
    file = tmp_path / "train.txt"
    file.write_text(content, encoding="utf-8")
    assert list(load_texts(str(file), "train")["text"]) == texts
    assert note in layout_note([file])
    assert bool(note) == bool(layout_note([file]))


def test_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, ".txt")
    load_texts(str(file), "train")
    file.write_text("new\n<|endoftext|>\nstories")
    assert list(load_texts(str(file), "train")["text"]) == ["new", "stories"]


@pytest.mark.parametrize("path", ["data[1]", "what?*", "a::b", "[red]x", "zip:", "naïve 🎉"])
@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl", ".txt"])
def test_any_name_of_a_folder_can_be_read(tmp_path: Path, path: str, ending: str) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain", ending)
    folder = (tmp_path / "plain").rename(tmp_path / path)
    assert list(load_texts(str(folder), "train")["text"]) == TEXTS
    assert [row["text"] for row in stream_texts(str(folder), "train")] == TEXTS


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "README.md"], {"train": [0, 1]}),
        (["plain_text/train-00000-of-00001-a1b2.jsonl", "plain_text/test-00000-of-00001-c3.jsonl"],
         {"train": [0], "test": [1]}),
        (["train/0000.jsonl", "train/0001.jsonl", "validation/0000.jsonl"], {"train": [0, 1], "validation": [2]}),
        (["train.jsonl.gz", "valid.jsonl.xz", "test.jsonl.bz2"], {"train": [0], "validation": [1], "test": [2]}),
        (["TinyStories-train.txt", "TinyStories-valid.txt"], {"train": [0], "validation": [1]}),
        (["Train.JSONL", "DEV.jsonl", "._Train.JSONL"], {"train": [0], "validation": [1]}),
    ],
)  # fmt: skip
def test_layouts_of_the_hub_are_understood(tmp_path: Path, names: list[str], found: dict[str, list[int]]) -> None:
    openers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = f"story {i}" if ".txt" in name else json.dumps({"text": f"story {i}"})
        with openers.get(Path(name).suffix, open)(tmp_path / name, "wt") as file:
            file.write(content)
    assert local_files(str(tmp_path)) == {split: [tmp_path / names[i] for i in of] for split, of in found.items()}
    for split, of in found.items():
        assert list(load_texts(str(tmp_path), split)["text"]) == [f"story {i}" for i in of]
        assert [row["text"] for row in stream_texts(str(tmp_path), split)] == [f"story {i}" for i in of]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.jsonl", "train.txt"], "train.jsonl and .*train.txt are both the train split"),
        (["train.jsonl", "train.jsonl.gz"], "are both the train split"),
        (["train.jsonl", "validation.jsonl", "valid.jsonl"], "are both the validation split"),
        (["train.jsonl", "data/train-00000-of-00001.jsonl"], "are both the train split"),
        (["small/train.jsonl", "large/train.jsonl"], "large/train.jsonl and .*small/train.jsonl are both"),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.csv"], "are both"),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "2 of the 3 shards of train, and number 1 is"),
    ],
)
def test_two_files_of_one_split_are_refused_and_named(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(InputError, match=message):
        load_texts(str(tmp_path), "train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".txt"])
def test_marks_of_the_encoding_are_no_text(tmp_path: Path, ending: str, encoding: str) -> None:
    file = write(tmp_path, ending)
    file.write_text(file.read_text(encoding="utf-8").replace("hi", "naïve 🎉"), encoding=encoding)
    assert list(load_texts(str(file), "train")["text"]) == [*TEXTS[:2], 'She said "naïve 🎉".']


def test_characters_that_are_none_are_replaced_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "train.jsonl").write_text(r'{"text": "Tom \ud83d ran \ud83d\ude00"}')
    (tmp_path / "validation.csv").write_bytes(b"text\nna\xefve\n")
    assert load_texts(str(tmp_path), "train")[0]["text"] == "Tom \ufffd ran 😀"
    (tmp_path / "test.txt").write_bytes("A \ufffd in UTF-8.".encode())
    load_texts(str(tmp_path), "test")
    assert "UTF-8" not in capsys.readouterr().out
    for _ in range(2):
        assert load_texts(str(tmp_path), "validation")[0]["text"] == "na\ufffdve"
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("validation.csv is not UTF-8: 1 character was replaced by \ufffd; save it as UTF-8") == 1


def test_every_text_of_a_csv_is_one_whatever_it_spells(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,label\nNA,0\n"N/A",1\nNone,0\nnull,true\nnan,1e2\n007,\n')
    assert load_texts(str(tmp_path), "train", ["text", "label"])[:] == {
        "text": ["NA", "N/A", "None", "null", "nan", "007"],
        "label": ["0", "1", "0", "true", "1e2", ""],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nWell, it was good,1\n", "line 2 has 3 fields, the header 2"),
        ('text,label\n"never closed,1\n', "cannot be read as csv"),
        ("text;label\na;1\n", "train.csv looks separated by semicolons: save it with commas, or as JSON lines"),
        ("text;label\na, b;1\n", "train.csv looks separated by semicolons: save it with commas, or as JSON lines"),
        ("text\tlabel\na\t1\n", "train.csv looks separated by tabs: save it with commas, or as JSON lines"),
    ],
)
def test_csv_that_would_lose_text_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        load_texts(str(tmp_path), "train")


def test_column_whose_type_changes_is_no_matter_where_it_is_not_asked_for(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": "two"}, {"text": "c", "id": {"n": [3]}}]
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=2))
    assert list(load_texts(str(tmp_path), "train")["text"]) == ["a", "b", "c"]


def test_cache_that_cannot_be_written_is_what_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    write(tmp_path, ".jsonl")
    with pytest.raises(InputError, match=r"file/datasets.* cannot be written .* set HF_HOME"):
        load_texts(str(tmp_path), "train")


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
        ("nobody/there-is-no-such-data-set", "could not be downloaded from the Hub"),
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


def test_new_revision_on_the_hub_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"main": "1" * 40, "v1": "2" * 40}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            revision = self.path.partition("/revision/")[2].partition("?")[0] or "main"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"id": "some/stories", "sha": answers[revision], "siblings": []}).encode())

        def log_message(self, *args: object) -> None: ...

    def fingerprint(revision: str | None = None) -> str:
        newest_revision.cache_clear()  # as in the next command
        return source_fingerprint("some/stories", revision)

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        look_for_hub.cache_clear()
        before, tagged = fingerprint(), fingerprint("v1")
        assert fingerprint() == before != tagged
        answers["main"] = "3" * 40
        assert fingerprint() != before
        assert fingerprint("v1") == tagged
        server.shutdown()
    look_for_hub.cache_clear()
    newest_revision.cache_clear()
