"""How a classifier judged texts whose labels are known: confusion, calibration, and its most confident mistakes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiment.pages.curves import COLORS

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

# The first that a run has: how its best validation judged the reviews, else what predict was asked.
SOURCES = ("evaluation.jsonl", "predictions.jsonl")
BINS = 10


@dataclass
class Verdicts:
    """Judgements of n texts among c classes."""

    names: list[str]  # of the classes
    texts: list[str]
    truth: np.ndarray  # (n,) int, true class
    probabilities: np.ndarray  # (n, c)
    source: str  # the file's name

    @property
    def predicted(self) -> np.ndarray:
        """(n,) int, the likeliest class."""
        return self.probabilities.argmax(axis=1)

    @property
    def confidence(self) -> np.ndarray:
        """(n,) the probability of the likeliest class."""
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
        import torch
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        predicted, truth = torch.from_numpy(self.predicted), torch.from_numpy(self.truth)
        return multiclass_confusion_matrix(predicted, truth, len(self.names)).numpy()

    def calibration(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean confidence, accuracy and number of texts of each of ten equal bins of confidence that holds any.

        By hand: torchmetrics' CalibrationError does not give the bins, and has one more for a confidence of 1.
        """
        place = np.minimum((self.confidence * BINS).astype(int), BINS - 1)
        counts = np.bincount(place, minlength=BINS)
        held = counts > 0
        confidence = np.bincount(place, self.confidence, BINS)[held] / counts[held]
        accuracy = np.bincount(place, self.correct, BINS)[held] / counts[held]
        return confidence, accuracy, counts[held]

    def calibration_error(self) -> float:
        """The expected calibration error: the mean distance of confidence and accuracy over the bins, weighted by
        their numbers of texts (Guo et al. 2017, arXiv:1706.04599)."""
        confidence, accuracy, counts = self.calibration()
        return float((np.abs(confidence - accuracy) * counts).sum() / counts.sum())

    def mistakes(self, most: int = 10) -> list[dict[str, Any]]:
        """The wrong verdicts, the most confident first."""
        wrong = np.flatnonzero(~self.correct)
        wrong = wrong[np.argsort(-self.confidence[wrong], kind="stable")][:most]
        return [
            {
                "text": self.texts[i],
                "truth": self.names[self.truth[i]],
                "predicted": self.names[self.predicted[i]],
                "confidence": float(self.confidence[i]),
            }
            for i in wrong
        ]


def read_verdicts(run: Path, sources: Sequence[str] = SOURCES) -> Verdicts | None:
    """The judged texts of a run, where a file of its holds some.

    A line is ``{"text": …, "label": …, "probabilities": {name: p, …}, "true_label": …}``; lines without
    ``true_label`` are left out.
    """
    for source in sources:
        file = run / source
        if not file.is_file():
            continue
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        lines = [line for line in lines if "true_label" in line and "probabilities" in line]
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


def draw_confusion(verdicts: Verdicts) -> "go.Figure":
    """Counts, coloured by their share of the true class."""
    import plotly.graph_objects as go

    counts = verdicts.confusion()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
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

    confidence, accuracy, counts = verdicts.calibration()
    figure = go.Figure()
    low = 1 / len(verdicts.names)  # the likeliest of c classes has at least 1 / c
    figure.add_scatter(
        x=[low, 1], y=[low, 1], mode="lines", line={"color": "#8a8f98", "dash": "dot", "width": 1.5},
        name="calibrated", hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=confidence,
        y=accuracy,
        customdata=counts,
        name="this run",
        mode="lines+markers",
        line={"color": COLORS[0], "width": 2},
        marker={"size": 8 + 22 * np.sqrt(counts / counts.sum()), "opacity": 0.8},
        hovertemplate="confidence %{x:.3f}<br>accuracy %{y:.3f}<br>%{customdata:,} texts<extra></extra>",
    )
    figure.update_layout(
        hovermode="closest",
        xaxis={"title": {"text": "confidence"}, "range": [low - 0.02, 1.03]},
        yaxis={"title": {"text": "accuracy"}, "range": [min(low, accuracy.min()) - 0.05, 1.06]},
    )
    return figure


def draw_confusion_png(verdicts: Verdicts) -> "Figure":
    """The same on white, by matplotlib."""
    from matplotlib.figure import Figure

    counts, names = verdicts.confusion(), verdicts.names
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.3)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, f"{count:,}\n{shares[row, column]:.1%}", ha="center", va="center", fontsize=9)
    axes.set(title="Confusion", xlabel="predicted", ylabel="true")
    axes.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(names)), yticklabels=names)
    return figure


def draw_pngs(verdicts: Verdicts, folder: Path) -> None:
    """confusion.png and calibration.png."""
    from matplotlib.figure import Figure

    draw_confusion_png(verdicts).savefig(folder / "confusion.png", dpi=250)
    confidence, accuracy, counts = verdicts.calibration()
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    low = 1 / len(verdicts.names)
    axes.plot([low, 1], [low, 1], ":", color="#8a8f98", label="calibrated")
    axes.plot(confidence, accuracy, color=COLORS[0])
    axes.scatter(confidence, accuracy, s=20 + 200 * counts / counts.sum(), color=COLORS[0], alpha=0.8)
    axes.set(title=f"Calibration (error {verdicts.calibration_error():.3f})", xlabel="confidence", ylabel="accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "calibration.png", dpi=250)
