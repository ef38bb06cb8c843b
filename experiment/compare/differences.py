"""The results of a comparison: tables, differences paired over seeds, a plot, and the page of the runs."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from scipy.stats import t

from experiment.compare.comparison import Comparison, Line
from experiment.console import console
from experiment.errors import InputError
from experiment.pages.curves import COLORS, axes_on_white
from experiment.pages.report import write_report
from experiment.runs.provenance import source_version
from experiment.wording import listed


def collect(comparison: Comparison, lines: Sequence[Line]) -> pd.DataFrame:
    """The table's values for each run and each quoted result: texts and metrics, NaN if missing."""
    names, runs = {*comparison.report, "parameters", "tokens"}, []
    rows = {row.name: vars(row) for row in comparison.rows}
    for line in lines:
        curve = pd.DataFrame(line.get("curve", {}))
        best_first = comparison.at == "best" and "val/loss" in curve
        validations = curve.sort_values("val/loss", kind="stable") if best_first else curve[::-1]
        seed = f"{line['seed']} failed (exit code {line['failed']})" if "failed" in line else str(line["seed"])
        figures = line | line.get("test", {}) | next(iter(validations.to_dict("records")), {})
        runs.append(rows[line["row"]] | figures | {"seeds": seed})
    runs += [{"row": name, "title": name, **figures} for name, figures in comparison.quoted.items()]
    frame = pd.DataFrame(runs).reindex(columns=["row", "seed", "seeds", "title", "group", "shows", *names])
    frame = frame.astype(dict.fromkeys(names, float)).fillna({"seeds": "", "group": "", "shows": ""})
    return frame.assign(compute=6 * frame["parameters"] * frame["tokens"])


def spread(values: pd.Series) -> str:
    """Mean ± standard deviation, which is omitted if all seeds agree; empty without values."""
    form = ".3g" if values.name == "compute" else ".4f" if "/" in values.name else ",.0f"
    mean, deviation = values.mean(), values.std()
    return "" if np.isnan(mean) else f"{mean:{form}}" + (f" ± {deviation:{form}}" if deviation > 0 else "")


def differences(frame: pd.DataFrame, metric: str, baseline: str) -> dict[str, str]:
    """For each row, its metric minus the baseline's: the mean over pairs with equal seeds, its standard error, and
    whether it is within the noise: its 95 % confidence interval (Student's t) contains 0."""
    of_seeds, texts = frame.pivot(index="seed", columns="row", values=metric), {}
    for row, pairs in of_seeds.drop(columns=baseline).sub(of_seeds[baseline], axis=0).items():
        pairs, middle, error = pairs.dropna(), pairs.mean(), pairs.sem()
        noise = ", within the noise" if abs(middle) <= t.ppf(0.975, len(pairs) - 1) * error else ""
        doubt = f" ± {error:.4f}{noise}" if len(pairs) > 1 else ", one seed"
        texts[row] = f"{middle:+.4f}{doubt}" if len(pairs) else ""
    return texts


def table(comparison: Comparison, frame: pd.DataFrame) -> pd.DataFrame:
    """Metrics with their spread, the difference from the baseline, and what each row shows, all as text."""
    columns = {"group": "first", "title": "first", **dict.fromkeys(comparison.report, spread)}
    shown = frame.groupby("row", sort=False).agg({**columns, "seeds": ", ".join, "shows": "first"})
    if base := comparison.baseline:
        metric = comparison.metric["name"]
        shown.insert(len(columns), f"{metric}: difference from {base}", pd.Series(differences(frame, metric, base)))
    shown = shown.fillna("").rename(columns={"title": "row", "shows": "what it shows"})
    return shown.loc[:, (shown != "").any()]


def show(comparison: Comparison, lines: Sequence[Line], out: Path) -> None:
    """Print the table, and write it as Markdown, CSV and JSON lines, with a plot and the page of the runs."""
    folder, frame = out / comparison.name, collect(comparison, lines)
    folder.mkdir(parents=True, exist_ok=True)
    shown, file = table(comparison, frame), folder / f"{comparison.name}.md"
    notes = [f"Mean ± standard deviation over the seeds, at the {comparison.at} validation."]
    if comparison.baseline:
        notes += ["Differences: paired over the seeds, ± standard error; within the noise: 0 is in the 95 % interval."]
    notes += dict.fromkeys(f"Evaluated on {line['evaluated']} (their hash)." for line in lines if "evaluated" in line)
    if len({line.get("tokenizer") for line in lines}) > 1:
        notes += ["Tokenizers differ: compare bits per byte, not losses or token counts."]
    sources, now = {line.get("environment", {}).get("source") for line in lines} - {None}, source_version()
    if sources - {now}:
        notes += [f"Made by the source {listed(sorted(sources))}, now {now}; to run all again, give another --out."]
    rows_of_runs = pd.DataFrame(lines).groupby("key")["row"].agg(", ".join)
    notes += [f"One run for {rows}: their settings are equal." for rows in dict.fromkeys(rows_of_runs) if ", " in rows]
    printed = Table(title=comparison.name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in shown:  # narrow, since a pipe has 80 columns
        printed.add_column(name, overflow="fold", min_width=max(map(len, " ".join([name, *shown[name]]).split())))
    for cells in shown.itertuples(index=False):
        printed.add_row(*cells)
    console.print(printed, "\n".join(notes), sep="\n")
    lines_of_page = [[*shown], ["---"] * shown.shape[1], *shown.to_numpy()]
    page = "".join(f"| {' | '.join(cells)} |\n" for cells in lines_of_page) + "\n" + "\n\n".join(notes)
    file.write_text(f"{page}\n", encoding="utf-8")
    shown.to_csv(file.with_suffix(".csv"), index=False)
    file.with_suffix(".jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    draw(comparison, frame, file.with_suffix(".png"))
    runs = {line["row"]: out / "runs" / line["key"] for line in reversed(lines) if line.get("environment")}
    here = {run: row for row, run in runs.items() if (run / "metrics.csv").is_file()}  # not on another machine
    if here:
        write_report([*here], folder, [*here.values()])
    console.print(f"written: tables, plot, page in {folder}; runs in {out / 'runs'}, by the `key` in {file.stem}.jsonl")
    absent = [name for name in comparison.report if frame[name].isna().all()]
    if absent and not all("failed" in line for line in lines):
        raise InputError(f"{', '.join(absent)}: no run has this metric; docs/configuration.md lists them")


def draw(comparison: Comparison, frame: pd.DataFrame, file: Path) -> None:
    """Plot the metric of each row and seed, or the metric against compute with a fitted power law."""
    metric, by_row = comparison.metric["name"], comparison.plot == "rows"
    x, y = (metric, "title") if by_row else ("compute", metric)
    axes = axes_on_white(9, 0.3 * frame["row"].nunique() + 1.2 if by_row else 4.2)
    if by_row:
        axes.yaxis.update_units(frame["title"])  # in order, including failed ones
        axes.invert_yaxis()
        axes.axvline(frame[frame["row"] == comparison.baseline][metric].mean(), color="gray", linewidth=0.8)
        axes.set_xlabel(metric)
    else:
        axes.set(xscale="log", yscale="log", xlabel="C = 6 x parameters x tokens, FLOP", ylabel=metric)
        axes.yaxis.set_minor_formatter("{x:g}")
    for color, (group, part) in zip(itertools.cycle(COLORS), frame.dropna(subset=[x, y]).groupby("group", sort=False)):
        axes.plot(part[x], part[y], "o", color=color, markersize=3.5, alpha=0.6)
        if by_row:
            seeds = part.groupby("title")[metric].agg(["mean", "std"])
            axes.errorbar(seeds["mean"], seeds.index, None, seeds["std"], "|", color=color, markersize=12, capsize=3)
        elif part[x].nunique() > 1:
            slope, level = np.polyfit(np.log(part[x]), np.log(part[y]), 1)
            axes.plot(part[x], np.exp(level) * part[x] ** slope, color=color, label=f"{group}: C^{slope:.3f}")
            axes.legend(frameon=False)
    axes.figure.savefig(file, dpi=150)
