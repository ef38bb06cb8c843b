"""The report of a run: what it shows, that it is safe and self-contained, and that its figures are right."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from experiment.pages.curves import CHARTS, MOST_POINTS, find_series, is_log, smooth
from experiment.pages.predictions import read_verdicts
from experiment.pages.report import duration, main, short, spread, write_report
from experiment.wording import MEANINGS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKUP = "<script>alert(1)</script> & <b>bold</b> {{ 1 + 1 }}"


def write_run(folder: Path, columns: list[str], rows: list[list], **config: object) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    (folder / "config.yaml").write_text(json.dumps({"trainer": {"max_steps": 100}, "model": config}))
    (folder / "run.json").write_text(
        json.dumps(
            {
                "parameters": {"trainable": 10, "total": 935_040},
                "environment": {"cpu": "A CPU", "torch": "2.13.0"},
                "calls": [
                    {"command": "python -m lm fit --seed_everything 1", "started": "2026-01-02 03:04:05 +0000",
                     "from_step": 0, "to_step": 100, "seconds": 75.0}
                ],
            }
        )
    )  # fmt: skip
    return folder


@pytest.fixture
def language_run(tmp_path: Path) -> Path:
    columns = ["step", "train/data_seconds", "train/gradient_norm", "train/mfu", "train/step_seconds",
               "train/learning_rate", "train/loss", "train/tokens", "train/tokens_per_second",
               "val/bits_per_byte", "val/loss", "val/perplexity"]  # fmt: skip
    rows = [
        [
            s,
            1e-4,
            1.5,
            0.4,
            0.3,
            1e-3,
            5 - s / 50,
            2048 * s,
            7000 + s,
            *((1.5, 4.9 - s / 50, 99.0) if s % 20 == 0 else ("", "", "")),
        ]
        for s in range(1, 101)
    ]
    run = write_run(tmp_path / "tiny", columns, rows, num_layers=2)
    samples = [
        {"step": step, "prompt": prompt, "story": f"{prompt} there was step {step}. {MARKUP}"}
        for step in range(10, 101, 10)
        for prompt in ("Once upon a time", "One day")
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return run


@pytest.fixture
def classifier_run(tmp_path: Path) -> Path:
    rows = [[s, 0.7 - s / 300, 0.5 + s / 250, *((0.6, 0.8) if s % 50 == 0 else ("", ""))] for s in range(1, 101)]
    run = write_run(tmp_path / "sure", ["step", "train/loss", "train/accuracy", "val/loss", "val/accuracy"], rows)
    lines = [
        {"text": f"{MARKUP} number {i}", "probabilities": {"negative": 1 - p, "positive": p}, "true_label": truth}
        for i, (p, truth) in enumerate([(0.9, "positive"), (0.8, "negative"), (0.99, "negative"), (0.2, "negative")])
    ]
    lines.append({"text": "no label is known", "probabilities": {"negative": 0.5, "positive": 0.5}})
    (run / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def text_of(page: Path) -> str:
    """The page without Plotly's own script."""
    head, _, rest = page.read_text(encoding="utf-8").partition("<script>")
    return head + rest[rest.index("</script>") :]


def test_report_shows_figures_samples_configuration_and_command(language_run: Path) -> None:
    page = write_report([language_run])
    assert page == language_run / "report.html" and page.stat().st_size < 2.5e6  # Plotly's script alone has 4.7
    text = text_of(page)
    for expected in (
        "2.9", "best, at step 100", "935 k", "1 min", "205 k tokens", "A CPU", "num_layers", "there was step 10.",
        "there was step 100.", "python -m lm fit --seed_everything 1",
        *(f"val/{name}: {MEANINGS[name]}" for name in ("loss", "perplexity", "bits_per_byte")),
    ):  # fmt: skip
        assert expected in text, expected
    assert {path.name for path in (language_run / "figures").iterdir()} == {"loss.png", "perplexity.png"}


def test_text_of_a_run_never_becomes_markup(language_run: Path, classifier_run: Path) -> None:
    for run in (language_run, classifier_run):
        text = text_of(write_report([run]))
        assert "alert(1)" in text
        assert "<script>alert" not in text and "<b>bold" not in text
        assert "{{ 1 + 1 }}" in text


def test_classifier_report_shows_confusion_calibration_and_most_confident_mistakes(classifier_run: Path) -> None:
    text = text_of(write_report([classifier_run]))
    assert "4 texts of evaluation.jsonl, which is the best validation: accuracy\n  0.5000" in text
    assert re.search(r"expected calibration error\s+0\.\d{4} \(how far stated and true probability lie apart", text)
    assert text.index("positive 99.0 %") < text.index("positive 80.0 %")
    drawn = {path.name for path in (classifier_run / "figures").iterdir()}
    assert {"accuracy.png", "confusion.png", "calibration.png"} <= drawn


def test_compared_runs_share_each_chart_and_show_what_differs(language_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(language_run, other)
    (other / "config.yaml").write_text('{"trainer": {"max_steps": 100}, "model": {"num_layers": 7}}')
    page = write_report([language_run, other], tmp_path / "both")
    text = text_of(page)
    differing = text[text.index("Differences") : text.index("Curves")]
    assert "model.num_layers" in differing and "<td>7</td>" in differing
    assert "max_steps" not in differing
    loss, _ = json.JSONDecoder().raw_decode(text, text.index('"loss": {') + len('"loss": '))
    runs = (f"{tmp_path.name}/tiny", "elsewhere/tiny")
    names = {trace["name"] for trace in loss["data"] if trace.get("name")}
    assert names == {f"{run} {split}/loss" for run in runs for split in ("train", "val")}
    shown = [trace["line"]["dash"] for trace in loss["data"] if trace.get("showlegend", True)]
    assert len(set(shown)) == len(shown) == 2  # equal curves do not hide each other
    assert not list(language_run.glob("report*"))


def test_run_that_was_cut_off_while_writing_still_has_a_report(language_run: Path) -> None:
    with (language_run / "metrics.csv").open("a") as file:
        file.write("101,0.001,nan,206848.0,7000,nan,nan,nan\n102,0.0")
    assert "at step 100" in text_of(write_report([language_run]))


@pytest.mark.parametrize(("runs", "words"), [(["nowhere"], "nowhere does not exist"), (["tiny", "./tiny"], "twice")])
def test_folder_that_is_no_run_is_refused_in_one_line(
    runs: list[str], words: str, language_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(language_run.parent)
    with pytest.raises(SystemExit) as exit_:
        main(runs)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert words in error and error.count("\n") == 1
    assert not list(language_run.parent.rglob("report.html"))


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs a chromium to open the page in")
def test_page_draws_every_chart_without_errors_or_network(language_run: Path, classifier_run: Path) -> None:
    page = write_report([language_run, classifier_run])  # every kind of chart on one page
    browser = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--enable-logging=stderr", f"--user-data-dir={language_run / 'profile'}",
         "--virtual-time-budget=4000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    # The page's policy allows no address at all: a request that is tried is an error on the console.
    assert "CONSOLE" not in browser.stderr, browser.stderr
    assert "Content-Security-Policy" in browser.stdout and "default-src 'none'" in browser.stdout
    plots = re.findall(r'<div class="plot[^"]*" id="([^"]+)"', browser.stdout)
    assert {chart.key for chart in CHARTS} | {"confusion-1", "calibration-1"} == set(plots)
    drawn = browser.stdout.count('class="js-line"') + browser.stdout.count("heatmap-label")
    assert browser.stdout.count('class="main-svg"') >= len(plots) and drawn >= len(plots)


def test_mistakes_come_with_the_most_confident_first(classifier_run: Path) -> None:
    verdicts = read_verdicts(classifier_run)
    assert [(m["confidence"], m["predicted"], m["truth"]) for m in verdicts.mistakes()] == [
        (0.99, "positive", "negative"), (0.8, "positive", "negative"),
    ]  # fmt: skip


def test_tokens_of_a_validation_step_lie_between_those_of_the_logged_steps() -> None:
    rows = [{"step": s, "train/tokens": 10 * s} for s in (10.0, 20.0)]
    (series,) = find_series({"run": [*rows, {"step": 15.0, "val/loss": 2.0}]}, CHARTS[0])
    assert series.tokens.tolist() == [150.0]


def test_axis_is_logarithmic_only_where_the_values_span_much() -> None:
    for last, expected in ((1.3, False), (99.0, True)):
        rows = [{"step": 1.0, "val/perplexity": 1.4}, {"step": 2.0, "val/perplexity": last}]
        assert is_log(find_series({"run": rows}, CHARTS[1]), CHARTS[1]) == expected


def test_long_run_is_thinned_and_keeps_its_course() -> None:
    rows = [{"step": float(s), "train/loss": float(s)} for s in range(1, 10 * MOST_POINTS)]
    (series,) = find_series({"run": rows}, CHARTS[0])
    assert len(series.steps) <= MOST_POINTS and (series.steps == series.values).all()


def test_smoothing_is_the_mean_of_the_window_and_skips_what_is_not_a_number() -> None:
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    assert smooth(values, 3).tolist() == [1.5, 3.0, 4.0, 5.0, 4.0]


def test_numbers_are_written_for_people() -> None:
    assert [short(n) for n in (12, 1_228_800, 935_040, 2.5e9)] == ["12", "1.23 M", "935 k", "2.5 B"]
    assert [duration(s) for s in (12.3, 75, 3725)] == ["12 s", "1 min", "1 h 2 min"]
    assert spread(list(range(100))) == [0, 20, 40, 59, 79, 99]
    assert spread([1, 2]) == [1, 2]
