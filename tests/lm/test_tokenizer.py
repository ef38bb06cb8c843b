"""The tokenizers: lossless, of LLaMA's layout, the same ids as SentencePiece, llama2.c and transformers."""

import json
import random
import struct
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiment.errors import InputError
from lm.data.bpe import from_pieces, train_tokenizer
from lm.data.demo_stories import demo_texts
from lm.data.tokenizer import BYTES, SPACE, StoryTokenizer
from lm.data.tokenizer_files import load_tokenizer, read_llama2c_tokenizer, write_llama2c_tokenizer

STORIES = demo_texts("validation")[:200]
SPECIAL_LOOKS = "He wrote </s> and <s>, <unk>, [INST], <0x41> on the wall."


@pytest.fixture(scope="module")
def trained() -> StoryTokenizer:
    return train_tokenizer(STORIES, 600)


@pytest.fixture(scope="module")
def mistral(shared: Path) -> StoryTokenizer:
    return load_tokenizer(shared / "tokenizers/mistral-v3-32768")


@pytest.fixture(scope="module")
def real_stories(shared: Path) -> list[str]:
    return pyarrow.parquet.read_table(shared / "data/tinystories/validation.parquet")["text"].to_pylist()


def score_greedy(pieces: list[bytes], scores: list[float], text: str) -> list[int]:
    """The encoder of llama2.c's run.c, line by line: characters, else bytes; then the best-scored pair, leftmost."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens: list[int] = []
    for character in " " + text if text else "":
        whole = character.encode()
        tokens += [ids[whole]] if whole in ids else [byte + 3 for byte in whole]
    while True:
        best, best_score, best_id = -1, -1e10, -1
        for i in range(len(tokens) - 1):
            merged = ids.get(pieces[tokens[i]] + pieces[tokens[i + 1]])
            if merged is not None and scores[merged] > best_score:
                best, best_score, best_id = i, scores[merged], merged
        if best < 0:
            return tokens
        tokens[best : best + 2] = [best_id]


def read_bin(path: Path) -> tuple[list[bytes], list[float]]:
    data, pieces, scores, offset = path.read_bytes(), [], [], 4
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append(data[offset + 8 : offset + 8 + length])
        scores.append(score)
        offset += 8 + length
    return pieces, scores


def test_trained_layout_is_llamas(trained):
    vocab = trained.backend.get_vocab()
    assert trained.vocab_size == len(vocab) == 600
    assert [trained.backend.id_to_token(i) for i in range(259)] == ["<unk>", "<s>", "</s>", *BYTES]
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (1, 2, 2)
    assert trained.special_ids == {0, 1, 2}
    assert SPACE + "the" in vocab


def test_no_piece_crosses_a_word_or_mixes_letters_with_marks(trained):
    for i in range(259, 600):
        piece = trained.backend.id_to_token(i)
        assert SPACE not in piece[1:]
        body = piece.removeprefix(SPACE)
        assert body == "" or body.isalpha() or body.isdigit() or not any(c.isalnum() for c in body), piece
        assert "\n" not in piece


@settings(max_examples=400, deadline=None)
@given(text=st.text())
@example(text="  two spaces first,  two inside, one last ")
@example(text=f"{SPACE} a real {SPACE}{SPACE} U+2581 \ufdd0 and a noncharacter{SPACE}")
@example(text="\n\n\t\x00\x7f\r\n e\u0301 é 👩‍👩‍👧 \U0010ffff")
@example(text=SPECIAL_LOOKS)
@example(text="")
def test_any_text_comes_back_and_its_bytes_add_up(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.text_bytes(ids).sum() == len(text.encode())
    assert not trained.special_ids & set(ids)


@pytest.mark.parametrize("text", [*STORIES[:5], "  two  spaces ", f"{SPACE}x{SPACE}", SPECIAL_LOOKS, "漢字 🎉\n"])
def test_text_comes_back_from_mistrals(mistral, text):
    ids = mistral.encode(text)
    assert mistral.decode(ids) == text
    assert mistral.text_bytes(ids).sum() == len(text.encode())
    assert not mistral.special_ids & set(ids)


def test_decode_skips_special_tokens(trained):
    assert trained.decode([trained.bos_id, *trained.encode("Hello you"), trained.eos_id]) == "Hello you"


def test_training_reaches_the_exact_size_or_the_largest_possible():
    largest = train_tokenizer(STORIES, 50_000).vocab_size
    assert largest < 50_000
    assert train_tokenizer(STORIES, largest).vocab_size == largest
    assert train_tokenizer(STORIES, 270).vocab_size == 270
    with pytest.raises(InputError, match="at least 260"):
        train_tokenizer(STORIES, 259)


def test_training_is_deterministic(trained):
    assert train_tokenizer(STORIES, 600).fingerprint == trained.fingerprint
    assert train_tokenizer(STORIES, 601).fingerprint != trained.fingerprint


def test_trained_ids_equal_llama2c_encoder(trained, tmp_path):
    write_llama2c_tokenizer(trained, tmp_path / "tokenizer.bin")
    pieces, scores = read_bin(tmp_path / "tokenizer.bin")
    merged = [score for score in scores[259:] if score > min(scores)]
    assert merged == [-float(rank) for rank in range(len(merged))]
    rng = random.Random(0)
    noise = ["".join(rng.choices('aabehnot  .!"\n1é', k=60)) for _ in range(40)]
    for text in [*STORIES[:10], *noise, "aaaaaaa hahahaha nooooo....!!!", "", "12 345", f"a{SPACE}b"]:
        assert trained.encode(text) == score_greedy(pieces, scores, text), text


def test_llama2c_file_written_and_read_back_gives_the_same_ids(trained, tmp_path):
    write_llama2c_tokenizer(trained, tmp_path / "tokenizer.bin")
    back = read_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    assert back.vocab_size == trained.vocab_size
    assert back.encode_batch(STORIES) == trained.encode_batch(STORIES)
    assert (back.bytes_per_token == trained.bytes_per_token).all()


def test_stories260k_tokenizer_gives_the_golden_prompt(shared):
    folder = shared / "models/stories260K"
    golden = json.loads((folder / "golden_once_upon_a_time_n200_ids.json").read_text())
    tokenizer = load_tokenizer(folder / "tok512.bin")
    assert [tokenizer.bos_id, *tokenizer.encode(golden["prompt"])] == golden["prompt_ids"]
    text = (folder / "golden_once_upon_a_time_n200.txt").read_text().strip()
    assert tokenizer.decode(golden["all_ids"]).strip() == text


def test_stories260k_file_survives_reading_and_writing(shared, real_stories, tmp_path):
    source = shared / "models/stories260K/tok512.bin"
    pieces, scores = read_bin(source)
    tokenizer = load_tokenizer(source)
    write_llama2c_tokenizer(tokenizer, tmp_path / "tokenizer.bin")
    assert read_bin(tmp_path / "tokenizer.bin")[0] == pieces
    assert load_tokenizer(tmp_path / "tokenizer.bin").encode_batch(real_stories[:50]) == tokenizer.encode_batch(
        real_stories[:50]
    )
    for text in real_stories[:10]:
        assert tokenizer.encode(text) == score_greedy(pieces, scores, text)


def test_sentencepiece_model_equals_its_tokenizer_json_on_real_stories(shared, mistral, real_stories):
    from sentencepiece import SentencePieceProcessor

    file = shared / "tokenizers/mistral-v3-32768/tokenizer.model"
    model = load_tokenizer(file)
    assert (model.vocab_size, model.bos_id, model.eos_id) == (32768, 1, 2)
    ids = model.encode_batch(real_stories)
    assert ids == mistral.encode_batch(real_stories)
    assert ids == SentencePieceProcessor(model_file=str(file)).encode(real_stories)


@pytest.mark.parametrize("which", ["trained", "mistral"])
def test_saved_tokenizer_loads_in_transformers_and_adds_bos_only(which, request, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = request.getfixturevalue(which)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, tokenizer.vocab_size)
    assert theirs.pad_token_id == tokenizer.pad_id
    for text in [*STORIES[:20], "  two  spaces\n"]:
        ids = theirs(text)["input_ids"]
        assert ids == [1, *tokenizer.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_saved_tokenizer_loads_again_with_the_same_ids(trained, tmp_path):
    trained.save(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        back = load_tokenizer(name)
        assert back.encode_batch(STORIES) == trained.encode_batch(STORIES)
        assert (back.bos_id, back.eos_id, back.pad_id) == (1, 2, 2)
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(tmp_path).fingerprint


def byte_level_tokenizer(**options) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(STORIES, trainer)
    return backend


def test_byte_level_tokenizers_as_gpt2s_count_their_bytes(tmp_path):
    byte_level_tokenizer(add_prefix_space=False).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == 0
    for text in [*STORIES[:5], f"  é {SPACE} 🎉 <|endoftext|>\n"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.text_bytes(ids).sum() == len(text.encode())
        assert 0 not in ids


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("template", [False, True])
def test_prompt_begins_as_in_transformers_and_stays_so_when_saved(tmp_path, config, template):
    from transformers import AutoTokenizer

    backend = byte_level_tokenizer(add_prefix_space=False)
    backend.add_special_tokens(["<bos>"])
    if template:
        bos = ("<bos>", backend.token_to_id("<bos>"))
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    (tmp_path / "source").mkdir()
    backend.save(str(tmp_path / "source/tokenizer.json"))
    described = {"bos_token": "<bos>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps(described | config))
    tokenizer = load_tokenizer(tmp_path / "source")
    tokenizer.save(tmp_path / "saved")
    for folder in ("source", "saved"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder)
        for text in STORIES[:3]:
            ids = theirs(text)["input_ids"]
            assert tokenizer.encode_prompt(text) == load_tokenizer(tmp_path / folder).encode_prompt(text) == ids
    assert tokenizer.encode_prompt("") == [tokenizer.bos_id]
    tokenizer.begin_with_bos()
    tokenizer.save(tmp_path / "trained")
    assert AutoTokenizer.from_pretrained(tmp_path / "trained")("Tom")["input_ids"] == tokenizer.encode_prompt("Tom")
    assert tokenizer.encode_prompt("Tom") == [tokenizer.bos_id, *tokenizer.encode("Tom")]


def test_a_tokenizer_that_loses_text_is_refused(shared):
    with pytest.raises(InputError, match=r"bert-base-uncased"):
        load_tokenizer(shared / "tokenizers/bert-base-uncased")


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, shared):
    noise = random.Random(0).randbytes(5000)
    (tmp_path / "empty").mkdir()
    names = [str(tmp_path / "missing.json"), "./missing", str(tmp_path / "empty"), "nobody/nothing-here", "nothing"]
    for ending in (".json", ".model", ".bin", ".txt"):
        for kind, content in (("noise", noise), ("void", b"")):
            file = tmp_path / f"{kind}{ending}"
            file.write_bytes(content)
            names.append(str(file))
    cut = tmp_path / "cut.bin"
    cut.write_bytes((shared / "models/stories260K/tok512.bin").read_bytes()[:-3])
    other = tmp_path / "other.json"
    other.write_text('{"hello": 1}')
    for name in [*names, str(cut), str(other)]:
        with pytest.raises(InputError) as error:
            load_tokenizer(name)
        assert Path(name).name in str(error.value) and "\n" not in str(error.value)


def test_hostile_llama2c_headers_are_refused(tmp_path):
    for data in [
        struct.pack("<i", 2**31 - 1) + struct.pack("<fi", 0.0, 2**31 - 1),
        struct.pack("<i", 5) + struct.pack("<fi", 0.0, -1) * 300,
        struct.pack("<i", 5) + struct.pack("<fi", float("nan"), 1) + b"a",
        struct.pack("<i", 5) + (struct.pack("<fi", 0.0, 1) + b"a") * 300,
        b"\x05\x00",
    ]:
        (tmp_path / "t.bin").write_bytes(data)
        with pytest.raises(InputError, match=r"t\.bin"):
            load_tokenizer(tmp_path / "t.bin")


def test_pieces_that_make_no_tokenizer_are_refused():
    layout = ["<unk>", "<s>", "</s>", *BYTES]
    with pytest.raises(InputError, match="twice"):
        from_pieces([*layout, "a", "a"], [0.0] * 261)
    with pytest.raises(InputError, match="UTF-8"):
        from_pieces([*layout, b"\xff"], [0.0] * 260)
    with pytest.raises(InputError, match="<0x41>"):
        from_pieces([piece for piece in layout if piece != "<0x41>"], [0.0] * 258)


def test_special_tokens_stand_for_no_bytes(trained):
    assert (trained.bytes_per_token[:3] == 0).all()
    assert (trained.bytes_per_token[3:259] == 1).all()
    assert (trained.bytes_per_token[259:] >= 1).all()


def test_byte_that_is_no_utf8_costs_no_character_before_it(shared) -> None:
    tokenizer = load_tokenizer(shared / "models/stories260K/tok512.bin")
    ids = tokenizer.encode("Tom 🎉")
    broken = tokenizer.encode("🎉")[-4]  # the first of the four bytes of the character, alone
    assert tokenizer.decode([*ids, broken]) == "Tom 🎉\ufffd"
