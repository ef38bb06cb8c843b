"""Loggers beside metrics.csv: TensorBoard gets what W&B gets, and an extra that is missing is told before the start."""

from pathlib import Path

import pytest

from experiment import extras
from lm.__main__ import main
from tests.runs import TINY, rows, write_stories

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def arguments(in_tmp: Path) -> list[str]:
    return ["fit", f"--data.path={write_stories(in_tmp / 'stories')}", *TINY, "--run_dir=run"]


def test_tensorboard_has_curves_and_samples_by_steps_over_a_resume(arguments: list[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments += [f"--config={CONFIGS / 'tensorboard.yaml'}", "--samples.every_n_steps=2", "--samples.prompts=[a | b]"]
    main([*arguments, "--trainer.max_steps=4"])
    main([*arguments, "--trainer.max_steps=6", "--ckpt_path=last"])
    events = EventAccumulator("run/tensorboard").Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses == pytest.approx({int(row["step"]): float(row["train/loss"]) for row in rows(Path("run"))})
    newest = events.Tensors("samples/text_summary")[-1]
    table = newest.tensor_proto.string_val[0].decode()
    assert newest.step == 6 and table.startswith("|step|prompt|story|\n|---|---|---|\n|2|a \\| b|")
    assert table.count("\n") == 4


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_whose_package_is_missing_is_refused_before_anything_is_written(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda package: None)
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, f"--config={CONFIGS / name}.yaml"])
    assert exit_.value.code == 2
    assert f"pip install '.[{name}]'" in capsys.readouterr().err and not Path("run").exists()


def test_a_metric_that_is_not_there_cannot_tell_the_best(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--best.monitor=val/nothing", "--trainer.max_steps=6"])
    assert "best.monitor val/nothing" in capsys.readouterr().err
