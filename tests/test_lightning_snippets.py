"""Every block of docs/lightning.md is laid over a small run, which ends well."""

import re
from pathlib import Path

import pytest

from lm.__main__ import main
from tests.runs import TINY, write_stories

PAGE = (Path(__file__).parents[1] / "docs" / "lightning.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"\*\*(.*?)\*\*.*?```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_there_are_at_least_ten() -> None:
    assert len(SNIPPETS) >= 10


@pytest.mark.filterwarnings("ignore:.*Anomaly Detection.*:UserWarning")
@pytest.mark.parametrize("snippet", [text for _, text in SNIPPETS], ids=[title for title, _ in SNIPPETS])
def test_snippet_runs(snippet: str, in_tmp: Path) -> None:
    Path("snippet.yaml").write_text(snippet, encoding="utf-8")
    stories = write_stories(Path("stories"))
    main(["fit", *TINY, f"--data.path={stories}", "--trainer.max_steps=6", "--run_dir=run", "--config=snippet.yaml"])
    assert Path("run/config.yaml").is_file()
