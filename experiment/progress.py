"""Progress output: one console for everything, and bars for slow work."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from experiment.console import console
from experiment.wording import MEANINGS


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields the function that advances it by a number of items.

    Work that continues after the last item shows as a bar of unknown length.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def advance(items: int) -> None:
            bar.advance(task, items)
            if bar.finished:
                bar.update(task, total=None)

        yield advance


class _Metrics(ProgressColumn):
    """The newest value of each metric logged with ``prog_bar=True``, as many as fit on the line."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        metrics = task.fields.get("metrics", {})
        short = {name.removeprefix("train/").replace("_per_second", "/s"): value for name, value in metrics.items()}
        return Text(format_metrics(dict(sorted(short.items(), key=lambda item: item[0] != "loss"))))


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


def print_figures(figures: Mapping[str, float], explained: bool = False) -> None:
    """One line per metric, the loss first, with four significant digits and optionally its meaning."""
    width = max(map(len, figures), default=0)
    for name, value in sorted(figures.items(), key=lambda item: (not item[0].endswith("/loss"), item[0])):
        meaning = MEANINGS.get(name.rpartition("/")[2].removeprefix("second_"), "") if explained else ""
        console.print(Text(f"  {name:<{width}}  {value:<7.4g}  ").append(meaning, "dim"))


class RunProgressBar(ProgressBar):
    """One bar over the whole training, by optimizer steps: loss, tokens per second and the time left.

    Lightning's own bar restarts at each epoch, which says little about a run with a fixed number of steps. On a pipe no
    bar is drawn; the results of each validation are printed as a line in both cases.

    Args:
        shown_as_written: Predictions are shown token by token, which leaves no room for a bar.
    """

    def __init__(self, shown_as_written: bool = False) -> None:
        super().__init__()
        self.shown_as_written = shown_as_written
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
                TextColumn("{task.description}", markup=False),
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

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._bar is not None:
            shown = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
            self._bar.update(self._task, completed=trainer.global_step, metrics=shown)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.print(f"step {trainer.global_step:,}: {format_metrics(validation_results(trainer))}")
        if self._bar is not None:
            self._bar.update(self._task, description="training")

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

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, _: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if self._bar is not None and trainer.state.fn == "fit":  # the bar is the training's
            self._bar.update(self._task, description=f"validating {batch_idx + 1}/{sum(trainer.num_val_batches)}")
        else:
            self._advance()

    def _advance(self, *args: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.shown_as_written:
            self._start("predicting", sum(trainer.num_predict_batches))

    on_test_batch_end = _advance
    on_predict_batch_end = _advance

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()
