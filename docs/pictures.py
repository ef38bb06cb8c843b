"""``make pictures``: the pictures of README and docs, drawn from results or taken of the newest demo in Chromium.

Needs Debian's packages chromium and chromium-driver (or Google's Chrome and its driver) and the extras dev and play.
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiment.compare.comparison import read_comparison
from experiment.compare.differences import collect, draw
from experiment.pages.play import newest_demo, open_page
from experiment.pages.report import write_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

PICTURES = Path(__file__).parent / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HINT = "install Debian's packages chromium and chromium-driver"


def open_browser(width: int, height: int) -> "Chrome":
    from selenium import webdriver

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        sys.exit(f"error: no {'browser' if browser is None else 'chromedriver'} was found: {HINT}")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    arguments = "--headless=new --no-sandbox --disable-dev-shm-usage --disable-background-networking --no-proxy-server"
    for argument in (*arguments.split(), f"--window-size={width},{height}", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def wait(until: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            sys.exit("error: the page did not come to its end within a minute")
        time.sleep(0.1)


def click(browser: "Chrome", selector: str, text: str) -> None:
    def found() -> list:
        elements = browser.find_elements("css selector", selector)
        return [element for element in elements if element.text.strip() == text and element.is_displayed()]

    wait(found)
    found()[0].click()


def take_play_page(runs: list[Path]) -> None:
    """play.png: a story that the demo's model tells, with a card over one of its words; review.png: two verdicts."""
    from selenium.webdriver.common.action_chains import ActionChains

    page, address = open_page(runs)
    browser = open_browser(1150, 1010)
    try:
        browser.get(address)
        click(browser, "button", "Write")
        wait(lambda: browser.find_elements("css selector", ".figures"))
        words = browser.find_elements("css selector", ".answer .word")[:60]
        beside = [word for word in words if 100 < word.location["x"] < 600]  # where the card has room
        strengths = [float(word.get_attribute("style").partition("--strength: ")[2].rstrip(";")) for word in beside]
        doubted = beside[strengths.index(max(strengths))]
        ActionChains(browser).move_to_element(doubted).perform()
        time.sleep(0.5)
        browser.save_screenshot(str(PICTURES / "play.png"))
        click(browser, "button[role=tab]", "Reviews")
        click(browser, "button", "Judge")
        wait(lambda: browser.find_elements("css selector", ".verdicts"))
        time.sleep(0.5)
        browser.save_screenshot(str(PICTURES / "review.png"))
    finally:
        browser.quit()
        page.close()


def take_report(run: Path) -> None:
    """report.png: the top of the page of a run."""
    page = write_report([run])
    browser = open_browser(1150, 880)
    try:
        browser.get(page.resolve().as_uri())
        wait(lambda: browser.find_elements("css selector", ".js-plotly-plot .main-svg"))
        time.sleep(1)
        browser.save_screenshot(str(PICTURES / "report.png"))
    finally:
        browser.quit()


def draw_ablation() -> None:
    """lm_ablation.png: what `make lm-ablation` gave, kept in docs/lm_ablation.csv."""
    comparison, _ = read_comparison(["configs/comparisons/lm_ablation.yaml"])
    runs = pd.read_csv(PICTURES.with_name("lm_ablation.csv")).to_dict("records")
    draw(comparison, collect(comparison, runs), PICTURES / "lm_ablation.png")


def main() -> None:
    draw_ablation()
    runs = newest_demo()
    PICTURES.mkdir(exist_ok=True)
    take_play_page(runs)
    take_report(next(run for run in runs if run.name == "lm"))
    for picture in sorted(PICTURES.glob("*.png")):
        print(f"{picture}: {picture.stat().st_size // 1000} KB")


if __name__ == "__main__":
    main()
