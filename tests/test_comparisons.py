"""Every comparison of configs/comparisons, shrunk to seconds, and one that is killed inside a run."""

import csv
import os
import signal
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from experiment.compare import runner as compare
from experiment.compare.comparison import read_comparison
from experiment.pages.summary import read_metrics
from experiment.sources.configurations import read_configuration
from lm.data.module import TextDataModule
from tests.classify.conftest import save_tiny_bert
from tests.processes import Commands, fork_commands
from tests.runs import TINY, write_stories

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs" / "comparisons").glob("*.yaml"))
SHRUNK = {
    "lm": [
        *(flag for flag in TINY if not flag.startswith(("--trainer.", "--checkpoint.", "--samples."))),
        "--trainer.accelerator=cpu", "--samples.every_n_steps=0", "--data.path=stories", "--model.compile=false",
        "--budget", "steps=2", "points=1",
    ],
    "classify": [
        "--model.name=bert", "--data.path=demo", "--data.train_size=16", "--data.validation_size=8",
        "--data.test_size=8", "--data.max_length=32", "--data.batch_size=8", "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
    ],
}  # fmt: skip


@pytest.fixture
def forked(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are forks of a process that has imported everything, which saves the seconds that each would take.

    Each finds the mark of a W&B service that has ended, as one of a notebook would, and must start its own.
    """
    ended = {"WANDB_SERVICE": "3-1-unix-/nowhere/socket"}
    fork_commands(commands, monkeypatch, env=ended)


def test_killed_comparison_goes_on_inside_its_run_to_the_same_figures(
    in_tmp: Path, commands: Commands, forked: None
) -> None:
    write_stories(Path("stories"))
    content = {
        "package": "lm", "seeds": [1], "report": ["val/loss", "tokens"], "rows": {"small": {}},
        "metric": {"name": "val/loss", "goal": "minimize"}, "budget": {"steps": 32, "points": 8},
    }  # fmt: skip
    Path("lm.yaml").write_text(yaml.safe_dump(content))
    arguments = ["lm.yaml", *SHRUNK["lm"][:-3], "--model.optimizer.warmup_steps=0"]
    process = commands.start(*arguments, package="experiment.compare")
    process.wait(until=lambda: list(Path("runs").rglob("last.ckpt")))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not Path("runs/comparisons/results.jsonl").exists()
    compare.main(arguments)
    compare.main([*arguments, "--out", "whole"])
    (ours,), (expected,) = (list(compare.read_results(Path(out)).values()) for out in ("runs/comparisons", "whole"))
    assert ours["curve"]["val/loss"] == expected["curve"]["val/loss"] and len(ours["curve"]["val/loss"]) == 8
    assert ours["curve"]["tokens"] == expected["curve"]["tokens"] and ours["seconds"] > 0
    rates = [row["train/learning_rate"] for row in read_metrics(Path("whole/runs") / expected["key"])]
    assert rates[-1] < 0.2 * rates[0]  # the schedule ends with the budget


def test_budget_of_tokens_is_met_and_rows_that_are_judged_by_other_text_are_refused(
    in_tmp: Path, forked: None, capsys: pytest.CaptureFixture
) -> None:
    write_stories(Path("stories")), write_stories(Path("others"), validation=5)
    content = {
        "package": "lm", "seeds": [3], "report": ["val/loss", "tokens"], "rows": {"cut": {}},
        "metric": {"name": "val/loss", "goal": "minimize"}, "flags": {"trainer.accumulate_grad_batches": 2},
    }  # fmt: skip
    Path("lm.yaml").write_text(yaml.safe_dump(content))
    flags = [flag for flag in SHRUNK["lm"][:-3] if "decoder.dropout" not in flag]
    data = TextDataModule(path="stories", vocab_size=345, sequence_length=16, batch_size=4)
    epoch = sum(int(batch["loss_mask"].sum()) for batch in data.train_dataloader())  # padding is not counted
    compare.main(["lm.yaml", *flags, "--budget", f"tokens={2 * epoch}", "points=2"])
    (line,) = compare.read_results(Path("runs/comparisons")).values()
    assert line["curve"]["tokens"][-1] == 2 * epoch and len(line["curve"]["tokens"]) == 2
    rows = {"cut": {}, "other": {"flags": {"data.path": "others"}}}
    Path("lm.yaml").write_text(yaml.safe_dump(content | {"rows": rows}))
    with pytest.raises(SystemExit, match=r"^2$"):
        compare.main(["lm.yaml", *flags, "--budget", "steps=2"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "rows are evaluated on every token of every story of" in error and " (other)" in error


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_comparison_is_rows_of_configurations_none_of_which_is_another(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    comparison, _ = read_comparison([str(file)])
    keys = [row.key for row in comparison.rows]  # reads their configurations
    assert len(set(keys)) == len(keys) > 1 and comparison.metric["name"] in comparison.report


def test_trials_of_equal_time_take_fewer_steps_where_a_step_costs_more_and_differ_in_nothing_else_that_takes_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    steps: dict[tuple[bool, int], set[int]] = {}  # by dropout and weights, which say what a step costs
    for row in read_comparison(["configs/comparisons/fast_trials.yaml"])[0].rows:
        decoder, data = row.config["model"]["decoder"], row.config["data"]
        assert "steps" in row.budget and not any(flag.startswith("trainer.") for flag in row.flags), row.name
        assert (data["batch_size"], data["sequence_length"], data["vocab_size"]) == (16, 256, 4096), row.name
        weights = decoder["num_layers"] * decoder["hidden_size"] * decoder["intermediate_size"]
        steps.setdefault(("dropout" in decoder, weights), set()).add(row.budget["steps"])
    plain = [of_cost for (dropout, _), of_cost in sorted(steps.items()) if not dropout]
    assert all(len(of_cost) == 1 for of_cost in steps.values()) and len(plain) > 4
    assert all(max(costlier) < min(cheaper) for cheaper, costlier in pairwise(plain))
    assert all(max(of_cost) < min(steps[False, weights]) for (dropout, weights), of_cost in steps.items() if dropout)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_comparison_runs(file: Path, in_tmp: Path, forked: None) -> None:
    write_stories(Path("stories"))
    save_tiny_bert(Path("bert"))
    Path("configs").symlink_to(ROOT / "configs")
    comparison, _ = read_comparison([str(file)])
    package, names = comparison.rows[0].package, [row.name for row in comparison.rows]
    sweep = "command" in read_configuration(file)  # its rows differ in values alone
    chosen = names[:1] if sweep else names[:: 1 + len(names) // 5]
    try:
        compare.main([str(file), "--seeds", "1", "--only", *chosen, *SHRUNK[package]])
    except SystemExit:
        pytest.fail("\n".join(log.read_text(errors="replace")[-2000:] for log in in_tmp.glob("output-*.log")))
    with Path(f"runs/comparisons/{comparison.name}/{comparison.name}.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["seeds"] for row in rows] == ["1"] * len(chosen) + [""] * len(comparison.quoted)
    others, _ = compare.read_comparison([str(file), "--seeds", "1", *SHRUNK[package]])
    for row in (row for row in others.rows if row.name not in chosen):  # the other rows' flags exist
        with pytest.raises(SystemExit, match=r"^0$"):
            import_module(f"{row.package}.__main__").main(["fit", *row.arguments, "--print_config"])
