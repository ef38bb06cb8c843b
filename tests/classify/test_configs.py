"""Every YAML under configs/classify runs, and says what each of its keys is for."""

import json
import re
from pathlib import Path

import pytest
import yaml

from classify.__main__ import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "classify").glob("*.yaml"))
BASES = ("custom", "demo")  # the others are laid over custom.yaml
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def leaves(config: dict, prefix: str = "") -> dict[str, str]:
    """Every value, as text, by its name with dots."""
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: repr(value)}
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_runs_through_fit_test_and_predict(config, tmp_path, small_run):
    configs = ["--config", str(config)]
    if config.stem not in BASES:
        configs = ["--config", str(ROOT / "configs/classify/custom.yaml"), *configs]
    main(["fit", *configs, *small_run, "--trainer.max_steps=3", f"--run_dir={tmp_path / 'run'}"])
    saved = f"--config={tmp_path / 'run' / 'config.yaml'}"
    tested = main(["test", saved, "--ckpt_path=best"])
    assert 0 <= tested.trainer.callback_metrics["test/accuracy"] <= 1
    main(["predict", saved, "--ckpt_path=best", "--data.texts=[A gripping film., Far from clever.]"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["A gripping film.", "Far from clever."]
    assert all(line["label"] in ("negative", "positive") for line in lines)
    assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4) for line in lines)


def test_what_is_laid_over_custom_repeats_none_of_it():
    common = leaves(yaml.safe_load((ROOT / "configs/classify/custom.yaml").read_text()))
    for config in CONFIGS:
        if config.stem not in BASES:
            own = leaves(yaml.safe_load(config.read_text()))
            assert own and not own.items() & common.items(), config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_has_a_header_a_result_and_a_comment_on_every_key(config):
    lines = config.read_text().splitlines()
    header = lines[: lines.index("")]
    assert all(line.startswith("#") for line in header)
    assert any("Measured result" in line for line in header)
    for above, line in zip(lines[len(header) - 1 :], lines[len(header) :], strict=False):
        commented = re.search(r"^\w+:$|\s# \S", line) or re.match(r"\s+# ", above)
        assert not line.strip() or commented, line
