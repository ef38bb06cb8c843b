"""A conversation in the terminal tells what the model tells elsewhere, and nothing that is typed ends it."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lm.convert import main as convert
from lm.data.tokenizer_files import load_tokenizer
from lm.decoding.generation import generate
from lm.formats.hugging_face import to_hugging_face
from lm.formats.pretrained import load_checkpoint
from lm.model.config import GenerationConfig
from lm.tell import main
from tests.lm.small import make_decoder, make_tokenizer

INTERRUPT = "Ctrl-C, half a second into what comes next"
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tell")
    to_hugging_face(make_decoder(), make_tokenizer(400), folder / "model")
    convert(["import", str(folder / "model"), str(folder / "run")])
    return folder / "run"


@pytest.fixture
def talk(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    def talk(*lines: str, run: Path = run) -> str:
        left = list(lines)

        def typed(prompt: str = "") -> str:
            if not left:
                raise EOFError
            if left[0] is INTERRUPT:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
                left.pop(0)
            return left.pop(0)

        monkeypatch.setattr("builtins.input", typed)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            main([str(run)])
        finally:
            signal.signal(signal.SIGINT, before)
        return capsys.readouterr().out

    return talk


def test_story_and_its_continuation_are_those_of_generate(run: Path, talk: Callable[..., str]) -> None:
    decoder, tokenizer = load_checkpoint(run / "checkpoints/last.ckpt")
    config = GenerationConfig(max_new_tokens=8, temperature=0, sliding_window=True)
    ids, texts = tokenizer.encode_prompt("Once upon a time"), []
    for _ in range(2):
        before = tokenizer.decode(ids)
        ids = ids + generate(decoder, [ids], config, tokenizer.eos_id)[0].token_ids
        texts.append(tokenizer.decode(ids)[len(before) :].rstrip("\ufffd"))
    printed = talk("/temperature 0", "/max_new_tokens 8", "Once upon a time", "")
    assert f"Once upon a time{texts[0]}" in printed
    assert texts[1] in printed
    assert printed.count("Enter continues; 8 tokens") == 2
    printed = talk("/temperature 0", "/max_new_tokens 1", "Once upon a time")
    assert f"{run}: type the beginning of a story" in printed.replace("\n", "")
    assert "Enter continues; 1 token, " in printed


def test_settings_change_are_shown_and_refused(talk: Callable[..., str]) -> None:
    printed = talk(
        "",
        "/top_k 5",
        "/settings",
        "/temperature -1",
        "/max_new_tokens many",
        "/seed x",
        "/tempreture red",
        "/help",
        "/new",
        "/quit",
        "x",
    )
    for expected in (
        "type a beginning first",
        "top_k is 5",
        "top_k 5",
        "forgotten",
        "/temperature -1: expected 0",
        "/max_new_tokens many: expected a whole number",
        "/seed x: expected a whole number",
        "/tempreture: there is no such command or setting (did you mean /temperature?)",
        "/settings shows all",
    ):
        assert expected in printed
    assert "a second)" not in printed  # what came after /quit was not told


def test_another_story_of_the_same_beginning_differs_and_a_seed_repeats_it(talk: Callable[..., str]) -> None:
    stories = [
        part.partition("\n(")[0] for part in talk("/max_new_tokens 8", "Tom", "Tom", "/seed 0", "Tom").split("Tom")[1:]
    ]
    assert stories[0] == stories[2] != stories[1]


def test_interrupt_stops_the_story_and_not_the_program(talk: Callable[..., str]) -> None:
    greedy = "/temperature 0"  # this story has 6,415 tokens, a sampled one 1,661, which a fast machine tells first
    printed = talk(greedy, "/max_new_tokens 1000000", INTERRUPT, "Tom had a \ud83d ball.", "/max_new_tokens 2", "")
    assert "Tom had a \ufffd ball." in printed
    assert "(stopped; " in printed
    assert "(Enter continues; 2 tokens" in printed


def test_chat_template_makes_it_a_chat_as_in_transformers(run: Path, talk: Callable[..., str], tmp_path: Path) -> None:
    chat = Path(shutil.copytree(run, tmp_path / "chat"))
    config = chat / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    tokenizer = load_tokenizer(chat / "tokenizer")
    tokenizer.save(tmp_path / "again")
    messages = [{"role": "user", "content": "Hello <s> you"}, {"role": "assistant", "content": "Hi"}]
    for folder in (chat / "tokenizer", tmp_path / "again"):
        theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert load_tokenizer(folder).encode_chat(messages) == theirs
    printed = talk("/max_new_tokens 3", "Hello", "And you?", run=chat)
    assert f"{chat}: a chat; type a message" in printed.replace("\n", "")
    assert printed.count("3 tokens") == 2
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{% for"}))
    assert "chat template cannot be used" in talk("Hello", run=chat)
    assert load_tokenizer(run / "tokenizer").chat_template is None


def test_run_that_is_not_there_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["nowhere"])
    assert ending.value.code == 2
    assert "nowhere does not exist" in capsys.readouterr().err
