"""The curves of one or several runs: as Plotly figures for the report, as PNGs for papers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes

Rows = list[dict[str, float]]

# Readable on white and near-black, and distinguishable with color blindness.
COLORS = ("#2f7fe0", "#e0700c", "#14996b", "#c2459b", "#8a63d2", "#a88400", "#d64545", "#0e95a7")
# So that equal runs do not hide each other.
DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))  # of Plotly, of matplotlib
SMOOTHED = 40  # number of averaging windows per curve
MOST_POINTS = 2_000  # points per curve; more are not visible and bloat the page


@dataclass(frozen=True)
class Chart:
    """One plot: the metrics it shows, if a run has them."""

    key: str  # names the PNG
    title: str
    metrics: tuple[str, ...]
    form: str  # of a value, as d3 and Python both understand it
    log: bool = False  # if the values span enough
    paper: bool = False  # drawn as a PNG too


STEP_SECONDS = ("train/step_seconds", "train/data_seconds")
CHARTS = (
    Chart("loss", "Loss", ("train/loss", "val/loss", "val/second_loss"), ".4f", paper=True),
    Chart(
        "perplexity", "Validation perplexity", ("val/perplexity", "val/second_perplexity"), ".4g", log=True, paper=True
    ),
    Chart("bits_per_byte", "Validation bits per byte", ("val/bits_per_byte", "val/second_bits_per_byte"), ".4f"),
    Chart("accuracy", "Accuracy", ("train/accuracy", "val/accuracy"), ".4f", paper=True),
    Chart("learning_rate", "Learning rate", ("train/learning_rate",), ".2e"),
    Chart("tokens_per_second", "Training tokens per second", ("train/tokens_per_second",), ",.0f"),
    Chart("gradient_norm", "Norm of the gradient before clipping", ("train/gradient_norm",), ".3g", log=True),
    Chart("step_seconds", "Seconds of a step, and of it those waiting for data", STEP_SECONDS, ".3g", log=True),
    Chart("mfu", "Share of the GPU's peak", ("train/mfu",), ".1%"),
)


@dataclass
class Series:
    """One metric of one run, as a chart shows it."""

    run: str
    metric: str
    color: str
    dash: tuple[str, str]
    steps: np.ndarray
    values: np.ndarray
    tokens: np.ndarray | None  # seen at these steps, if the run counted them
    label: str = ""  # its metric, its run if there are several, or both
    background: bool = False  # behind the validation curve of the same color

    @property
    def validation(self) -> bool:
        return self.metric.startswith("val/")

    @property
    def noisy(self) -> bool:
        """Whether it is noisy, since batches differ: drawn faintly, with its running mean on top."""
        return self.metric in ("train/loss", "train/accuracy") and len(self.values) >= 2 * SMOOTHED


def find_series(runs: dict[str, Rows], chart: Chart) -> list[Series]:
    """The curves of a chart. Colors distinguish runs, or the metrics of a single run."""
    found = []
    for place, (run, rows) in enumerate(runs.items()):
        counted = [(row["step"], row["train/tokens"]) for row in rows if "train/tokens" in row]
        for metric in chart.metrics:
            points = np.array([(row["step"], row[metric]) for row in rows if metric in row])
            if len(points) == 0:
                continue
            points = points[:: -(-len(points) // MOST_POINTS)]
            steps, values = points.T
            tokens = np.interp(steps, *np.array([(0, 0), *counted]).T) if counted else None
            color = COLORS[(place if len(runs) > 1 else chart.metrics.index(metric)) % len(COLORS)]
            dash = DASHES[place % len(DASHES)]
            found.append(Series(run, metric, color, dash, steps, values, tokens))
    several, metrics = len({one.run for one in found}) > 1, {one.metric for one in found}
    for one in found:
        names = (one.run if several else "", one.metric if len(metrics) > 1 or not several else "")
        one.label = " ".join(filter(None, names))
        one.background = several and not one.validation and any(other.validation for other in found)
    return found


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over a centred window, which is cut off at the ends."""
    return pd.Series(values).rolling(width, center=True, min_periods=1).mean().to_numpy()


def draw_interactive(series: Sequence[Series], chart: Chart) -> "go.Figure":
    """The chart for a page. Each trace carries the tokens seen as ``customdata``, for the other axis."""
    import plotly.graph_objects as go

    figure, several = go.Figure(), len({one.run for one in series}) > 1
    for one in series:
        options = {"x": one.steps, "customdata": one.tokens, "legendgroup": one.run if several else one.label}
        values, width = one.values, 2.4 if one.validation or len(chart.metrics) == 1 else 1.6
        if one.noisy:
            faint = {"color": one.color, "width": 1}
            figure.add_scatter(
                **options, y=values, mode="lines", line=faint, opacity=0.28, hoverinfo="skip", showlegend=False
            )
            values = smooth(values, len(values) // SMOOTHED)
        line = {"color": one.color, "width": width, "dash": one.dash[0]}
        if one.background:  # the legend of the validation curve switches it as well
            options |= {"opacity": 0.5, "showlegend": False}
            line["dash"] = "solid"
        figure.add_scatter(
            **options,
            y=values,
            name=one.label,
            mode="lines+markers" if len(values) < 60 and one.validation else "lines",
            line=line,
            marker={"size": 6},
            hovertemplate=f"%{{y:{chart.form}}}",
        )
    figure.update_layout(
        hovermode="x unified",
        showlegend=len(series) > 1,
        xaxis={"title": {"text": "step"}, "rangemode": "tozero", "unifiedhovertitle": {"text": "step %{x:,.0f}"}},
        yaxis={"type": "log", "dtick": "D2", "tickformat": "~g"} if is_log(series, chart) else {},
    )
    if chart.key == "tokens_per_second":
        figure.update_yaxes(rangemode="tozero")
    return figure


def is_log(series: Sequence[Series], chart: Chart) -> bool:
    """Whether the values span so much that a linear axis would show only the beginning."""
    values = np.concatenate([one.values[np.isfinite(one.values) & (one.values > 0)] for one in series])
    return chart.log and len(values) > 0 and values.max() > 5 * values.min()


def axes_on_white(width: float, height: float, grid: bool = True) -> "Axes":
    """Matplotlib axes in a figure of the given size in inches."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(width, height), layout="constrained").subplots()
    if grid:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw_png(series: Sequence[Series], chart: Chart, file: Path) -> None:
    """The same chart on white, 1,500 pixels wide."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes = axes_on_white(6, 3.6)
    for one in series:
        values = one.values
        if one.noisy:
            axes.plot(one.steps, values, color=one.color, alpha=0.25, linewidth=0.8)
            values = smooth(values, len(values) // SMOOTHED)
        axes.plot(
            one.steps,
            values,
            color=one.color,
            linewidth=1.8 if one.validation else 1.2,
            linestyle="-" if one.background else one.dash[1],
            marker="o" if one.validation and len(values) < 60 else None,
            markersize=3.5,
            alpha=0.6 if one.background else 1,
            label=one.label,
        )
    axes.set(title=chart.title, xlabel="step", yscale="log" if is_log(series, chart) else "linear")
    if is_log(series, chart):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if chart.key == "tokens_per_second":
        axes.set_ylim(bottom=0)
    if 1 < len(series) <= 2 * len(COLORS):  # more would leave no room for the curves
        axes.legend(frameon=False, fontsize=8)
    axes.figure.savefig(file, dpi=250)
