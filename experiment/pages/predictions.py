"""A classifier's predictions on labelled texts: confusion, calibration, and its most confident mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiment.pages.curves import COLORS, axes_on_white
from experiment.pages.summary import read_lines

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

# The first that exists: the predictions of the best validation, else those of predict.
SOURCES = ("evaluation.jsonl", "predictions.jsonl")
BINS = 10


@dataclass
class Verdicts:
    """Predictions for n texts and c classes."""

    names: list[str]  # of the classes
    texts: list[str]
    truth: np.ndarray  # (n,) int, true class
    probabilities: np.ndarray  # (n, c)
    source: str  # the file's name

    @property
    def predicted(self) -> np.ndarray:
        """(n,) int, the most likely class."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """(n,) the probability of the most likely class."""
        return self.probabilities.max(axis=1)

    @property
    def correct(self) -> np.ndarray:
        return self.predicted == self.truth

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows: each text with the predicted and the true class, and the probability of each."""
        classes = zip(self.predicted, self.truth, strict=True)
        rows = zip(self.texts, classes, self.probabilities.tolist(), strict=True)
        columns = ["text", "label", "true_label", *self.names]
        return columns, [[text, self.names[guess], self.names[true], *p] for text, (guess, true), p in rows]

    def confusion(self) -> np.ndarray:
        """(c, c) counts: true class by predicted class."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.truth, self.predicted, labels=range(len(self.names)))

    def calibration(self) -> pd.DataFrame:
        """Mean confidence, accuracy and number of texts for each non-empty one of ten equal bins of confidence.

        Our own: torchmetrics' CalibrationError does not return the bins, nor scikit-learn's their counts.
        """
        bins = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        texts = pd.DataFrame({"confidence": self.confidence, "accuracy": self.correct, "texts": 1})
        return texts.groupby(bins).agg({"confidence": "mean", "accuracy": "mean", "texts": "sum"})

    def calibration_error(self) -> float:
        """The expected calibration error: the mean gap between confidence and accuracy over the bins, weighted by
        their numbers of texts (Guo et al. 2017, arXiv:1706.04599)."""
        bins = self.calibration()
        return float(np.average(abs(bins["confidence"] - bins["accuracy"]), weights=bins["texts"]))

    def mistakes(self, most: int = 10) -> list[dict[str, Any]]:
        """The wrong predictions, most confident first."""
        columns, rows = self.table()
        frame = pd.DataFrame(rows, columns=columns)[["text", "label", "true_label"]].assign(confidence=self.confidence)
        wrong = frame[~self.correct].sort_values("confidence", ascending=False, kind="stable").head(most)
        return wrong.rename(columns={"label": "predicted", "true_label": "truth"}).to_dict("records")


def read_verdicts(run: Path, sources: Sequence[str] = SOURCES) -> Verdicts | None:
    """The predictions of a run, if it has a file with some.

    A line is ``{"text": …, "label": …, "probabilities": {name: p, …}, "true_label": …}``; lines without
    ``true_label`` are left out.
    """
    for source in sources:
        lines = [line for line in read_lines(run / source) if "true_label" in line and "probabilities" in line]
        if lines:
            names = list(lines[0]["probabilities"])
            return Verdicts(
                names=names,
                texts=[line["text"] for line in lines],
                truth=np.array([names.index(line["true_label"]) for line in lines]),
                probabilities=np.array([[line["probabilities"][name] for name in names] for line in lines]),
                source=source,
            )
    return None


def _counts_and_shares(verdicts: Verdicts) -> tuple[np.ndarray, np.ndarray]:
    counts = verdicts.confusion()
    return counts, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def draw_confusion(verdicts: Verdicts) -> "go.Figure":
    """Counts, colored by their share of the true class."""
    import plotly.graph_objects as go

    counts, shares = _counts_and_shares(verdicts)
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=verdicts.names,
            y=verdicts.names,
            text=counts,
            texttemplate="%{text:,}<br>%{z:.1%}",
            textfont={"size": 15},
            hovertemplate="true %{y}, predicted %{x}<br>%{text:,} texts, %{z:.1%} of %{y}<extra></extra>",
            colorscale=[[0, "rgba(47,127,224,0.06)"], [1, "rgba(47,127,224,0.6)"]],
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=3,
            ygap=3,
        )
    )
    plain = {"showgrid": False, "zeroline": False, "fixedrange": True}  # there is nothing to zoom into
    figure.update_layout(
        xaxis={"title": {"text": "predicted"}, **plain},
        yaxis={"title": {"text": "true"}, "autorange": "reversed", **plain},
    )
    return figure


def draw_calibration(verdicts: Verdicts) -> "go.Figure":
    """Accuracy against confidence; a calibrated classifier lies on the diagonal."""
    import plotly.graph_objects as go

    bins, figure = verdicts.calibration(), go.Figure()
    low = 1 / len(verdicts.names)  # the most likely of c classes has at least 1 / c
    figure.add_scatter(
        x=[low, 1], y=[low, 1], mode="lines", line={"color": "#8a8f98", "dash": "dot", "width": 1.5},
        name="calibrated", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=bins["confidence"],
        y=bins["accuracy"],
        customdata=bins["texts"],
        name="this run",
        mode="lines+markers",
        line={"color": COLORS[0], "width": 2},
        marker={"size": 8 + 22 * np.sqrt(bins["texts"] / bins["texts"].sum()), "opacity": 0.8},
        hovertemplate="confidence %{x:.3f}<br>accuracy %{y:.3f}<br>%{customdata:,} texts<extra></extra>",
    )
    figure.update_layout(
        hovermode="closest",
        xaxis={"title": {"text": "confidence"}, "range": [low - 0.02, 1.03]},
        yaxis={"title": {"text": "accuracy"}, "range": [min(low, bins["accuracy"].min()) - 0.05, 1.06]},
    )
    return figure


def draw_confusion_png(verdicts: Verdicts) -> "Figure":
    """The same on white, with matplotlib."""
    names, (counts, shares) = verdicts.names, _counts_and_shares(verdicts)
    axes = axes_on_white(4, 3.6, grid=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.3)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, f"{count:,}\n{shares[row, column]:.1%}", ha="center", va="center", fontsize=9)
    axes.set(title="Confusion", xlabel="predicted", ylabel="true")
    axes.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(names)), yticklabels=names)
    return axes.figure


def draw_pngs(verdicts: Verdicts, folder: Path) -> None:
    """confusion.png and calibration.png."""
    draw_confusion_png(verdicts).savefig(folder / "confusion.png", dpi=250)
    bins, low = verdicts.calibration(), 1 / len(verdicts.names)
    axes = axes_on_white(4, 3.6)
    axes.plot([low, 1], [low, 1], ":", color="#8a8f98", label="calibrated")
    axes.plot("confidence", "accuracy", color=COLORS[0], data=bins)
    axes.scatter(
        "confidence", "accuracy", 20 + 200 * bins["texts"] / bins["texts"].sum(), COLORS[0], alpha=0.8, data=bins
    )
    axes.set(title=f"Calibration (error {verdicts.calibration_error():.3f})", xlabel="confidence", ylabel="accuracy")
    axes.figure.savefig(folder / "calibration.png", dpi=250)
