"""What people see while they wait: one console for all output, bars for everything that takes its time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from experiment.console import console

__all__ = ["RunProgressBar", "console", "format_metrics", "progress", "validation_results"]


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields the function that advances it by a number of items."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda items: bar.advance(task, items)


class _Metrics(ProgressColumn):
    """The newest value of each metric that is logged with ``prog_bar=True``."""

    def render(self, task: Task) -> Text:
        return Text(format_metrics(task.fields.get("metrics", {})))


def format_metrics(metrics: dict[str, Any]) -> str:
    """``{"train/loss": 2.5, "tokens/s": 5321.0}`` as ``train/loss 2.500  tokens/s 5,321``."""
    return "  ".join(
        f"{name} {value:,.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}"
        for name, value in metrics.items()
        if isinstance(value, int | float)
    )


def validation_results(trainer: Trainer) -> dict[str, float]:
    """The newest validation metrics, the loss first."""
    results = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return dict(sorted(results.items(), key=lambda item: (item[0] != "val/loss", item[0])))


class RunProgressBar(ProgressBar):
    """One bar over the whole training, by optimizer steps: loss, tokens per second and the time left.

    Lightning's own bar starts anew with each epoch, which says little about a run of so many steps. On a pipe no
    bar is drawn; the results of each validation are printed as a line in both cases.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            console.print(*args)

    def _start(self, description: str, total: float) -> None:
        if self._enabled and console.is_terminal:
            self._stop()
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                _Metrics(),
            )
            self._bar = Progress(*columns, console=console, transient=True, refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task(description, total=None if total == float("inf") else int(total))

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("training", trainer.estimated_stepping_batches)
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            shown = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
            self._bar.update(self._task, completed=trainer.global_step, metrics=shown)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.print(f"step {trainer.global_step:,}: {format_metrics(validation_results(trainer))}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    # validate, test and predict on their own

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start("validating", sum(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("testing", sum(trainer.num_test_batches))

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None and args[0].state.fn != "fit":
            self._bar.advance(self._task)

    on_validation_batch_end = _advance
    on_test_batch_end = _advance

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()
