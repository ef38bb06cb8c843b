"""The page to try the models: by its answers, under many visitors at once, and in a real browser."""

import html
import json
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from classify.module import ReviewClassifier
from experiment.pages.play import main, open_page
from lm.convert import write_run
from lm.data.bpe import train_tokenizer
from lm.data.demo_stories import write_story
from lm.decoding.generation import generate
from lm.formats.pretrained import load_checkpoint
from lm.model.config import DecoderConfig, GenerationConfig
from lm.model.decoder import Decoder
from tests.classify.conftest import save_tiny_bert

pytest.importorskip("gradio", reason="needs the extra play")

from gradio_client import Client

from classify.demo import ClassifierDemo
from classify.play import show as show_verdict

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
MAX_LENGTH = 24
MARKUP = "<img src=x onerror=alert(1)> {{value}} ${value} Tom"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs lm, custom and peft: tiny models with random weights."""
    folder = tmp_path_factory.mktemp("play")
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = train_tokenizer([write_story(draw) for _ in range(200)], 400)
    decoder = Decoder(DecoderConfig(400, 32, 48, num_layers=2, num_heads=2, max_sequence_length=256))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # else a tied model repeats its last token
    write_run(decoder, tokenizer, folder / "lm", "demo")

    bert = save_tiny_bert(folder / "bert")
    for adapter in ("custom", "peft"):
        module = ReviewClassifier(str(bert), adapter=adapter, init_lora_weights=False)
        trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / adapter / "checkpoints" / "best.ckpt")
        data = {"tokenizer": None, "max_length": MAX_LENGTH, "truncation": "both"}
        (folder / adapter / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder


@pytest.fixture(scope="module")
def network() -> Iterator[socket.socket]:
    """Stands in for the way out: whatever the server asked of another machine would knock here."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


@pytest.fixture(scope="module")
def address(runs: Path, network: socket.socket) -> Iterator[str]:
    """The page over all runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"):  # as behind a company's proxy
            patch.setenv(name, f"http://127.0.0.1:{network.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "True")  # must not count
        page, address = open_page([runs / name for name in ("lm", "custom", "peft")])
        yield address
        page.close()


def wait(until: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def visitor(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


def text_of(answer: str) -> str:
    """The story alone."""
    return html.unescape(re.sub("<[^>]*>", "", answer.partition('<span class="figures')[0]))


@pytest.fixture(scope="module")
def told(runs: Path) -> Callable[..., str]:
    """A story without the page: `told(beginning, seed=1)`."""
    decoder, tokenizer = load_checkpoint(runs / "lm" / "checkpoints" / "last.ckpt")

    def tell(beginning: str, **options) -> str:
        prompt = [tokenizer.bos_id, *tokenizer.encode(beginning)]
        (result,) = generate(decoder, [prompt], GenerationConfig(**options), tokenizer.eos_id)
        return tokenizer.decode(prompt + result.token_ids)

    return tell


def test_ten_visitors_at_once_each_get_their_own_story(address: str, told: Callable[..., str]) -> None:
    def visit(number: int) -> str:
        client = Client(address, verbose=False, analytics_enabled=False)
        everybody.wait()
        return text_of(client.predict(f"Story {number % 5}", 1.1, 0.9, 30, number, api_name="/story"))

    everybody = threading.Barrier(10)
    with ThreadPoolExecutor(10) as visitors:
        stories = list(visitors.map(visit, range(10)))
    for number, story in enumerate(stories):
        options = {"max_new_tokens": 30, "temperature": 1.1, "top_p": 0.9, "seed": number}
        assert story == told(f"Story {number % 5}", **options)
    assert len(set(stories)) == 10


def test_what_cannot_be_answered_is_told_in_one_sentence(visitor: Client) -> None:
    def story(beginning: str | None, temperature: float = 1) -> str:
        return text_of(visitor.predict(beginning, temperature, 1, 5, 0, api_name="/story"))

    assert story(" ") == story(None) == "Type a beginning first, such as: Once upon a time"
    assert "901 tokens, but the context is 256 tokens. Shorten it." in story("Q" * 899)
    assert "1,000,000 characters" in story("Q" * 1_000_000)
    assert "Type a review first" in visitor.predict("", api_name="/review")
    assert "too long: 1,000,000 characters" in visitor.predict("Q" * 1_000_000, api_name="/review")


def test_a_vanished_run_is_answered_for_from_memory(runs: Path, visitor: Client) -> None:
    arguments = ("Tom", 0, 1, 5, 0)
    before = visitor.predict(*arguments, api_name="/story")
    (runs / "lm").rename(runs / "elsewhere")
    try:
        after = visitor.predict(*arguments, api_name="/story")
    finally:
        (runs / "elsewhere").rename(runs / "lm")
    assert text_of(before) == text_of(after)
    assert "was deleted" in after and "was deleted" not in before


@pytest.mark.parametrize("adapter", ["custom", "peft"])
def test_a_words_share_is_the_slope_of_the_log_odds(runs: Path, adapter: str) -> None:
    """Against the difference that growing the embeddings of the word's pieces a little makes, in float64."""
    critic = ClassifierDemo(runs / adapter / "checkpoints" / "best.ckpt", adapter)
    critic.module.double()
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "un": 5, "##watch": 6, "##able": 7, "film": 8, ",": 9}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    critic.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

    text, pieces = "film, unwatchable film", [[8], [9], [5, 6, 7], [8]]
    verdict = critic.explain(text)
    assert [text[begin:end] for begin, end, _ in verdict.words] == ["film", ",", "unwatchable", "film"]
    ids = torch.tensor([[2, *(piece for word in pieces for piece in word), 3]])
    embeddings = critic.module.model.get_input_embeddings()(ids).detach()
    label = critic.module.hparams.label_names.index(verdict.label)

    def log_odds(places: range, growth: float) -> float:
        grown = embeddings.clone()
        grown[:, places] *= 1 + growth
        logits = critic.module.model(inputs_embeds=grown, attention_mask=torch.ones_like(ids)).logits[0]
        return (logits[label] - logits[1 - label]).item()

    begin = 1
    for word, (_, _, share) in zip(pieces, verdict.words, strict=True):
        places = range(begin, begin + len(word))
        begin += len(word)
        assert share == pytest.approx((log_odds(places, 1e-5) - log_odds(places, -1e-5)) / 2e-5, rel=1e-4)


def test_a_long_review_is_judged_by_what_the_run_reads_of_it(runs: Path) -> None:
    critic = ClassifierDemo(runs / "custom" / "checkpoints" / "best.ckpt", "custom")
    words = ["brilliant", "dull"] * 20
    page = show_verdict(critic, " ".join(words))
    assert f"cut to {MAX_LENGTH} tokens: 22 of 40 were read" in page
    (pale,) = re.findall('<span class="cut">(.*?)</span>', page)
    assert pale.split() == words[11:-11]
    ids = critic.tokenizer(" ".join(words[:11] + words[-11:]), return_tensors="pt")
    expected = critic.module(ids["input_ids"], ids["attention_mask"]).softmax(-1)[0].tolist()
    assert list(critic.explain(" ".join(words)).probabilities.values()) == pytest.approx(expected)


def test_runs_that_are_not_there_are_told_in_one_line(in_tmp: Path, capsys: pytest.CaptureFixture) -> None:
    (in_tmp / "runs" / "demo-1" / "lm" / "checkpoints").mkdir(parents=True)  # of a demo that was cut short
    for arguments, expected in (
        ([], "make demo"),
        (["runs/demo-1/lm"], "runs/demo-1/lm holds no checkpoint"),
        (["runs/lm/nowhere"], "runs/lm/nowhere does not exist"),
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and expected in said and said.count("\n") == 1


class Browser:
    """A visitor with a headless Chromium."""

    def __init__(self, address: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--window-size=1200,1000",
            "--disable-background-networking",
            "--no-proxy-server",
        ):
            options.add_argument(argument)  # the last two: what a browser asks of its maker is not the page's doing
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
        self.driver.get(address)

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def click(self, what: str) -> None:
        path = f"//button[normalize-space()='{what}']"
        wait(lambda: self.driver.find_elements("xpath", path))
        next(one for one in self.driver.find_elements("xpath", path) if one.is_displayed()).click()

    def fill(self, label: str, text: object) -> None:
        from selenium.webdriver.common.keys import Keys

        (field,) = self.all(f"[aria-label='number input for {label}']") or self.driver.find_elements(
            "xpath", f"//label[.//span[normalize-space()='{label}']]//textarea"
        )
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(text), Keys.TAB)

    def story(self) -> str:
        """Click Write, wait for the end, and read."""
        self.driver.execute_script("document.querySelectorAll('.figures').forEach((one) => one.remove())")
        self.click("Write")
        wait(lambda: self.all(".figures"))
        return self.driver.execute_script(
            "const story = document.querySelector('.answer .text').cloneNode(true);"
            "story.querySelector('.figures').remove(); return story.textContent;"
        )


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Browser]:
    pytest.importorskip("selenium", reason="needs selenium")
    if not CHROMIUM or not CHROMEDRIVER:
        pytest.skip("needs chromium and chromedriver")
    browser = Browser(address)
    yield browser
    browser.driver.quit()


def test_a_story_streams_in_and_each_token_tells_what_it_might_have_been(
    browser: Browser, told: Callable[..., str]
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    wait(lambda: browser.all(".answer .text"))
    browser.driver.execute_script(
        "window.lengths = new Set();"
        "new MutationObserver(() => lengths.add(document.querySelectorAll('.word').length))"
        ".observe(document.body, {childList: true, subtree: true});"
    )
    browser.fill("Beginning", MARKUP)
    browser.fill("Length", 120)
    story = browser.story()
    assert story == told(MARKUP, max_new_tokens=120, temperature=0.8)
    assert len(browser.driver.execute_script("return [...lengths]")) > 3
    ActionChains(browser.driver).move_to_element(browser.all(".word")[3]).perform()
    wait(lambda: browser.all("#card:not([hidden])"))
    (card,) = browser.all("#card")
    assert len(card.find_elements("css selector", ".name")) in (5, 6)
    (taken,) = card.find_elements("css selector", ".name.taken")
    assert taken.get_property("textContent").strip() == browser.all(".word")[3].text.strip()


def test_the_same_seed_repeats_the_story_and_temperature_0_ignores_it(
    browser: Browser, told: Callable[..., str]
) -> None:
    browser.fill("Beginning", "Once upon a time")
    browser.fill("Length", 30)
    stories = []
    for seed in (3, 4, 3):
        browser.fill("Seed", seed)
        stories.append(browser.story())
    assert stories[0] == stories[2] != stories[1]
    browser.fill("Temperature", 0)
    greedy = [browser.story()]
    browser.fill("Seed", 4)
    greedy.append(browser.story())
    assert greedy == [told("Once upon a time", max_new_tokens=30, temperature=0)] * 2


def test_both_adapters_judge_the_same_review_side_by_side(browser: Browser, runs: Path) -> None:
    browser.click("Reviews")
    review = "The plot was brilliant, the acting dull. <b>Bold</b>"
    browser.fill("Review", review)
    browser.click("Judge")
    wait(lambda: len(browser.all(".verdicts section")) == 2)
    for adapter, section in zip(("custom", "peft"), browser.all(".verdicts section"), strict=True):
        critic = ClassifierDemo(runs / adapter / "checkpoints" / "best.ckpt", adapter)
        ids = critic.tokenizer(review, return_tensors="pt")
        shares = critic.module(ids["input_ids"], ids["attention_mask"]).softmax(-1)[0].tolist()
        assert [bar.text for bar in section.find_elements("css selector", ".bars > span:nth-child(3n)")] == [
            f"{share:.1%}" for share in shares
        ]
        assert section.find_element("css selector", "p.text").text == review
    left, right = (place.rect for place in browser.all(".verdicts section"))
    assert left["y"] == right["y"] and left["x"] < right["x"]


def test_no_request_left_this_machine_and_the_console_is_clean(
    browser: Browser, address: str, network: socket.socket
) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 10 and not [url for url in urls if not url.startswith((address, "data:", "blob:"))]
    assert browser.driver.get_log("browser") == []
    with pytest.raises(BlockingIOError):
        network.accept()
    with socket.socket() as outside, pytest.raises(OSError, match="refused"):  # listens on 127.0.0.1 alone
        outside.connect(("127.0.0.2", int(address.rstrip("/").rpartition(":")[2])))
