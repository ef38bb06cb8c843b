"""What the rows of a comparison gave: tables, differences paired over seeds, a plot, and the page of the runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import t

from experiment.compare.comparison import Comparison
from experiment.console import console
from experiment.pages.curves import COLORS
from experiment.pages.report import write_report

Lines = Sequence[Mapping[str, Any]]  # what each run left, with the name of its row
TITLES = {  # of a figure, and its format
    "train/loss": ("training loss", ".4f"), "val/loss": ("validation loss", ".4f"), "val/accuracy": ("accuracy", ".4f"),
    "val/perplexity": ("perplexity", ".2f"), "val/bits_per_byte": ("bits per byte", ".4f"),
    "test/accuracy": ("test accuracy", ".4f"), "tokens": ("tokens", ",.0f"), "seconds": ("seconds", ",.0f"),
    "training_seconds": ("training seconds", ",.0f"), "memory_mib": ("peak memory, MiB", ",.0f"),
    "trainable": ("trainable parameters", ",.0f"), "parameters": ("parameters", ",.0f"), "compute": ("FLOP", ".3g"),
}  # fmt: skip


def collect(comparison: Comparison, lines: Lines) -> pd.DataFrame:
    """Every figure that is reported or drawn, a row for each run; NaN where it has none."""
    names, runs = {*comparison.report, comparison.metric["name"], "parameters", "tokens", "failed"}, []
    for line in lines:
        curve = {name: values for name, values in line.get("curve", {}).items() if values}
        losses = curve.get("val/loss", [0.0])
        place = -1 if comparison.at == "last" else losses.index(min(losses))
        figures = {**line, **line.get("test", {}), **{name: values[place] for name, values in curve.items()}}
        runs.append({name: figures.get(name) for name in ("row", "seed", *names)})
    frame = pd.DataFrame(runs).astype(dict.fromkeys(names, float))
    return frame.assign(compute=6 * frame["parameters"] * frame["tokens"])


def differences(frame: pd.DataFrame, metric: str, baseline: str, form: str = ".4f") -> dict[str, str]:
    """Of each row, its metric less the baseline's: the mean of the pairs of equal seed and its standard error, and
    whether it may be chance, as where the interval that holds the true difference in 95 of 100 cases (Student's t)
    holds 0."""
    of_seeds, texts = frame.pivot(index="seed", columns="row", values=metric), {}
    for row, pairs in of_seeds.drop(columns=baseline).sub(of_seeds[baseline], axis=0).items():
        pairs, middle, error = pairs.dropna(), pairs.mean(), pairs.sem()
        noise = ", within the noise" if abs(middle) <= t.ppf(0.975, len(pairs) - 1) * error else ""
        spread = f" ± {error:{form}}{noise}" if len(pairs) > 1 else ", one seed"
        texts[row] = f"{middle:+{form}}{spread}" if len(pairs) else ""
    return texts


def cell(values: pd.Series, form: str) -> str:
    """`mean ± standard deviation`, without the second where all seeds agree; empty where there are no values."""
    spread = f" ± {values.std():{form}}" if values.std() > 0 else ""
    return f"{values.mean():{form}}{spread}" if values.count() else ""


def table(comparison: Comparison, frame: pd.DataFrame) -> pd.DataFrame:
    """Figures with their spread, the difference from the baseline, and what each row shows, all as text."""
    metric, base, rows = comparison.metric["name"], comparison.baseline, []
    forms = {name: TITLES.get(name, (name, ".4g")) for name in (*comparison.report, metric)}
    apart = differences(frame, metric, base, forms[metric][1]) if base else {}
    for row in comparison.rows:
        own = frame[frame["row"] == row.name]
        codes = ["" if np.isnan(code) else f" failed (exit code {code:.0f})" for code in own["failed"]]
        cells = {forms[name][0]: cell(own[name], forms[name][1]) for name in comparison.report}
        cells[f"{forms[metric][0]} less that of {base}"] = apart.get(row.name, "")
        seeds = ", ".join(f"{seed}{code}" for seed, code in zip(own["seed"], codes, strict=True))
        named = {"group": row.group, "row": row.title or row.name}
        rows.append({**named, **cells, "seeds": seeds, "what it shows": row.shows})
    for title, known in comparison.quoted.items():
        rows.append(
            {"row": title, **{forms[name][0]: f"{known[name]:{forms[name][1]}}" for name in known if name in forms}}
        )
    shown = pd.DataFrame(rows).fillna("")
    return shown.loc[:, (shown != "").any()]


def show(comparison: Comparison, lines: Lines, out: Path) -> None:
    """Print the table, and write it as Markdown, CSV and JSON lines beside a plot and the page of the runs."""
    folder, frame, metric = out / comparison.name, collect(comparison, lines), comparison.metric
    folder.mkdir(parents=True, exist_ok=True)
    shown, file = table(comparison, frame), folder / comparison.name
    notes = [f"Mean ± standard deviation over the seeds, at the {comparison.at} validation."]
    if comparison.baseline:
        notes += ["Differences are paired over the seeds, ± standard error; within the noise: at 95 % they may be 0."]
    notes += dict.fromkeys(f"Judged by {line['evaluated']}." for line in lines if "evaluated" in line)
    if len({line.get("tokenizer") for line in lines}) > 1:
        notes += ["Tokenizers differ: bits per byte compare, losses of a token and numbers of tokens do not."]
    scores = frame.groupby("row")[metric["name"]].mean().dropna().sort_values(ascending=metric["goal"] == "minimize")
    printed = Table(title=comparison.name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in shown:  # narrow, since a pipe has 80 columns
        printed.add_column(name, overflow="fold", min_width=max(map(len, " ".join([name, *shown[name]]).split())))
    for name, cells in zip([*(row.name for row in comparison.rows), *comparison.quoted], shown.to_numpy(), strict=True):
        printed.add_row(*cells, style="bold green" if name in scores.index[:1] else None)
    console.print(printed, "\n".join(notes), sep="\n")
    printed.box, printed.title, printed.padding = box.MARKDOWN, None, (0, 1)
    page = Console(width=100_000, highlight=False, markup=False, emoji=False)
    with page.capture() as text:
        page.print(printed, *notes, sep="\n\n")
    file.with_suffix(".md").write_text(text.get().strip() + "\n", encoding="utf-8")
    shown.to_csv(file.with_suffix(".csv"), index=False)
    file.with_suffix(".jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    draw(comparison, frame, file.with_suffix(".png"))
    runs = {line["row"]: out / "runs" / line["key"] for line in reversed(lines) if line.get("environment")}
    here = {row: run for row, run in runs.items() if (run / "metrics.csv").is_file()}  # not on another machine
    if here:
        write_report([*here.values()], folder, [*here])
    console.print(f"written: tables, plot and page in {folder}; the runs in {out / 'runs'}")


def draw(comparison: Comparison, frame: pd.DataFrame, file: Path) -> None:
    """The metric: of each row with every seed, or against compute with the line of a power law."""
    metric, kind, rows = comparison.metric["name"], comparison.plot, {row.name: row for row in comparison.rows}
    frame = frame.assign(place=frame["row"].map([*rows].index), group=frame["row"].map(lambda name: rows[name].group))
    picture = Figure(figsize=(9, 0.3 * len(rows) + 1.2 if kind == "rows" else 4.2), layout="constrained")
    axes = picture.subplots()
    axes.set(**{"xlabel" if kind == "rows" else "ylabel": TITLES.get(metric, (metric, ""))[0]})
    groups = frame.dropna(subset=metric).groupby("group", sort=False)
    for color, (group, part) in zip(COLORS * len(rows), groups, strict=False):
        if kind == "rows":
            spread = part.groupby("place")[metric].agg(["mean", "std"])
            look = {"color": color, "markersize": 12, "capsize": 3}
            axes.plot(part[metric], part["place"], "o", color=color, markersize=3.5, alpha=0.6)
            axes.errorbar(spread["mean"], spread.index, xerr=spread["std"], fmt="|", **look)
        else:
            axes.loglog(part["compute"], part[metric], "o", color=color)
            if part["compute"].nunique() > 1:
                slope, level = np.polyfit(np.log(part["compute"]), np.log(part[metric]), 1)
                line = np.exp(level) * part["compute"] ** slope
                axes.loglog(part["compute"], line, color=color, label=f"{group}: C^{slope:.3f}")
    if kind == "rows":
        base = frame[frame["row"] == comparison.baseline][metric].mean()
        for mark in (base, *(known.get(metric, np.nan) for known in comparison.quoted.values())):
            axes.axvline(mark, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [row.title or row.name for row in rows.values()])
        axes.invert_yaxis()
    else:
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("C = 6 x parameters x tokens, FLOP")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    picture.savefig(file, dpi=150)
