"""The terminal output at the end of fit."""

from pathlib import Path
from statistics import fmean

from lightning.pytorch import Trainer

from experiment.console import console
from experiment.pages.summary import read_metrics
from experiment.progress import print_figures, validation_results
from experiment.runs.checkpoints import BestCheckpoint


def training_loss(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean training loss of the steps logged between the last two validations, or before the only one."""
    validated = [0, 0, *(row["step"] for row in rows if "val/loss" in row)]
    losses = [row["train/loss"] for row in rows if "train/loss" in row and row["step"] > validated[-2]]
    return {"train/loss": fmean(losses)} if losses else {}


def tell_ending(trainer: Trainer, run_dir: Path, report: bool) -> str | None:
    """Print the results, and write the report if requested.

    Returns:
        The checkpoint to use, best or last; None if the run has none.
    """
    console.print(f"\nfinished after {trainer.global_step:,} steps; everything is in {run_dir}")
    logged = (run_dir / "metrics.csv").exists()
    print_figures((training_loss(read_metrics(run_dir)) if logged else {}) | validation_results(trainer))
    if report and logged:
        from experiment.pages.report import write_report  # imports plotting, which takes a second

        with console.status("writing the report"):
            page = write_report([run_dir])
        console.print(f"report: {page}")
    names = ["best", "last"]
    best = next((one for one in trainer.callbacks if isinstance(one, BestCheckpoint)), None)
    if best is not None and best.best_step == 0:
        console.print("note: the best validation was before the first step: best.ckpt holds the initial weights")
        names.reverse()
    elif best is not None and best.best_step not in (None, trainer.global_step):
        console.print(f"best.ckpt is of step {best.best_step:,}, with {best.monitor} {best.best_score:.4g}")
    return next((name for name in names if (run_dir / "checkpoints" / f"{name}.ckpt").exists()), None)
