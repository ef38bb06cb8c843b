"""Files with bytes flipped, cut, added or blanked at random are read or refused with our own error, nothing else.

``pytest tests/lm/test_hostile_files.py --fuzz 1000`` gives each reader as many damaged files.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from experiment.errors import InputError
from experiment.runs.reading import check_fits, read_checkpoint
from lm.data.bpe import train_tokenizer
from lm.data.demo_stories import demo_texts
from lm.data.module import TextDataModule
from lm.data.prompts import read_prompts
from lm.data.tokenizer_files import load_tokenizer
from lm.formats.gguf import from_gguf, to_gguf
from lm.formats.hugging_face import from_hugging_face, to_hugging_face
from lm.formats.llama2c import from_llama2c, to_llama2c
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder
from lm.training.module import LanguageModel

TEXTS = demo_texts("validation")[:12]
SHAPE = DecoderConfig(345, 8, 12, 1, 2, max_sequence_length=8)


def damage(data: bytes, random: np.random.Generator) -> bytes:
    """The same bytes after one to four accidents."""
    result = bytearray(data)
    for _ in range(random.integers(1, 5)):
        place = int(random.integers(len(result) or 1))
        size = int(random.integers(1, 1 + max(1, len(result) // 8)))
        match int(random.integers(6)):
            case 0 | 1:
                if result:
                    result[place] ^= 1 << int(random.integers(8))
            case 2:
                del result[place:]
            case 3:
                result[place : place + size] = bytes(len(result[place : place + size]))
            case 4:
                result[place:place] = random.bytes(min(size, 40))
            case 5:
                del result[place : place + size]
    return bytes(result)


Reader = tuple[list[Path], Callable[[], object]]


def jsonl(texts: list[str], key: str = "text") -> str:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(demo_texts("validation"), SHAPE.vocab_size)


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture
def make(tmp_path: Path, tokenizer, tokenizer_folder: str) -> Callable[[str], Reader]:
    """By name: the files of a good example, and what reads them."""

    def checkpoint() -> Reader:
        file, module = tmp_path / "last.ckpt", LanguageModel(SHAPE)
        rest = {"global_step": 3, "hyper_parameters": dict(module.hparams)}
        torch.save({"state_dict": module.state_dict(), **rest}, file)

        def read() -> None:
            check_fits(module, file)
            read_checkpoint(file)

        return [file], read

    def checkpoint_pickle() -> Reader:
        """Damage under checksums that are right: the pickle within the checkpoint."""
        (whole,), read_whole = checkpoint()
        with zipfile.ZipFile(whole) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in entries if name.endswith("data.pkl"))
        file = tmp_path / "data.pkl"
        file.write_bytes(entries[name])

        def read() -> None:
            with zipfile.ZipFile(whole, "w") as archive:
                for entry, content in (entries | {name: file.read_bytes()}).items():
                    archive.writestr(entry, content)
            read_whole()

        return [file], read

    def llama2c() -> Reader:
        file = tmp_path / "model.bin"
        to_llama2c(Decoder(SHAPE), tokenizer, file)
        beside = tmp_path / "model.tokenizer.bin"
        return [file, beside], lambda: from_llama2c(file, beside)

    def gguf() -> Reader:
        pytest.importorskip("gguf")
        file = tmp_path / "model.gguf"
        to_gguf(Decoder(SHAPE), tokenizer, file)
        return [file], lambda: from_gguf(file)

    def hugging_face() -> Reader:
        folder = tmp_path / "model"
        to_hugging_face(Decoder(SHAPE), tokenizer, folder)
        return [folder / "config.json", folder / "model.safetensors"], lambda: from_hugging_face(folder)

    def tokenizer_json() -> Reader:
        tokenizer.save(tmp_path / "tokenizer")
        files = [tmp_path / "tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
        return files, lambda: load_tokenizer(tmp_path / "tokenizer").encode("Tom ran.")

    def sentencepiece() -> Reader:
        import sentencepiece

        (tmp_path / "texts.txt").write_text("\n".join(demo_texts("validation")))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=400,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            minloglevel=2,
        )  # fmt: skip
        file = tmp_path / "spm.model"
        return [file], lambda: load_tokenizer(file).encode("Tom ran.")

    def source(name: str, write: Callable[[Path], object]) -> Reader:
        file = tmp_path / name
        write(file)
        (tmp_path / "validation.jsonl").write_text(jsonl(TEXTS))

        def read() -> None:
            data = TextDataModule(str(tmp_path), tokenizer_folder, sequence_length=16, batch_size=4)
            data.setup("fit")
            for _ in data.train_dataloader():
                pass

        return [file], read

    def prompts(name: str, text: str) -> Reader:
        file = tmp_path / name
        file.write_text(text)
        return [file], lambda: read_prompts(str(file))

    table = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    makers = {
        "checkpoint": checkpoint,
        "checkpoint_pickle": checkpoint_pickle,
        "llama2c": llama2c,
        "gguf": gguf,
        "hugging_face": hugging_face,
        "tokenizer_json": tokenizer_json,
        "sentencepiece": sentencepiece,
        "parquet": lambda: source("train.parquet", table.to_parquet),
        "csv": lambda: source("train.csv", table.to_csv),
        "jsonl": lambda: source("train.jsonl", lambda file: file.write_text(jsonl(TEXTS))),
        "txt": lambda: source("train.txt", lambda file: file.write_text("\n<|endoftext|>\n".join(TEXTS))),
        "prompts_txt": lambda: prompts("prompts.txt", "\n".join(TEXTS)),
        "prompts_json": lambda: prompts("prompts.json", json.dumps(TEXTS)),
        "prompts_jsonl": lambda: prompts("prompts.jsonl", jsonl(TEXTS, "prompt")),
    }
    return lambda name: makers[name]()


COSTLY = ("parquet", "csv", "jsonl", "txt", "sentencepiece")  # files that a library of its own caches and converts


@pytest.mark.parametrize(
    "name",
    ["checkpoint", "checkpoint_pickle", "llama2c", "gguf",
     "hugging_face", "tokenizer_json", "sentencepiece", "parquet", "csv", "jsonl", "txt",
     "prompts_txt", "prompts_json", "prompts_jsonl"],
)  # fmt: skip
def test_damaged_file_is_read_or_refused(
    name: str, make: Callable[[str], Reader], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TINYLAB_CACHE", str(tmp_path / "cache"))
    files, read = make(name)
    read()
    random, refused = np.random.default_rng(7), 0
    count = request.config.getoption("--fuzz") or (20 if name in COSTLY else 100)
    for round_ in range(count):
        file = files[round_ % len(files)]
        good = file.read_bytes()
        bad = damage(good, random)
        file.write_bytes(bad)
        try:
            read()
        except InputError:
            refused += 1
        except BaseException as error:  # a panic of the Rust readers is no Exception
            pytest.fail(f"damage {round_} of {file.name} ended in {type(error).__name__}: {error!s:.300}")
        file.write_bytes(good)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    print(f"{name}: {count} damaged files, {refused} refused, {count - refused} read")
    assert refused or name.startswith("prompts") or name in ("csv", "txt")
