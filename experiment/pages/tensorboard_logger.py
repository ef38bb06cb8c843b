"""TensorBoard: a run's curves and tables in its own folder; ``tensorboard --logdir runs`` shows those of all runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from experiment.extras import require
from experiment.pages.predictions import SOURCES, draw_confusion_png, read_verdicts
from experiment.runs.loggers import RunLogger

MOST_ROWS = 100  # of a table


class TensorBoardRunLogger(RunLogger):
    """Writes events to the run's tensorboard folder, by optimizer step; a resumed run continues the same
    curves."""

    def check(self) -> None:
        require("tensorboard", "tensorboard")

    @rank_zero_only
    def begin(self, trainer: Trainer, run: Path, package: str, record: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().begin(trainer, run, package, record, step)
        # Hide what a killed run logged after its checkpoint.
        self.experiment = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.experiment.add_text("command", f"    {record['calls'][-1]['command']}", step)
        config = (run / "config.yaml").read_text(encoding="utf-8")
        self.experiment.add_text("config.yaml", "".join(f"    {line}\n" for line in config.splitlines()), step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, self.trainer.global_step)

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows[-MOST_ROWS:]]
        text = "\n".join("|" + "|".join(_cell(value) for value in line) + "|" for line in lines)
        self.experiment.add_text(key, text, self.trainer.global_step)

    @rank_zero_only
    def end(self, run: Path) -> None:
        if (verdicts := read_verdicts(run, SOURCES[:1])) is not None:
            self.log_table("predictions", *verdicts.table())
            self.experiment.add_figure("confusion", draw_confusion_png(verdicts), self.trainer.global_step)
        self.experiment.close()


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
