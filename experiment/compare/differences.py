"""What the rows of a comparison gave: tables, differences paired over seeds, a plot, and the page of the runs."""

import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.table import Table

from experiment.compare.comparison import Comparison
from experiment.console import console
from experiment.pages.curves import COLORS
from experiment.pages.report import write_report

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by row, the line of each seed
Values = Mapping[str, Mapping[str, Mapping[int, float]]]  # by row and figure, the value of each seed
TITLES = {  # of a figure, and its format
    "train/loss": ("training loss", ".4f"), "val/loss": ("validation loss", ".4f"), "val/accuracy": ("accuracy", ".4f"),
    "val/perplexity": ("perplexity", ".2f"), "val/bits_per_byte": ("bits per byte", ".4f"),
    "test/accuracy": ("test accuracy", ".4f"), "tokens": ("tokens", ",.0f"), "seconds": ("seconds", ",.0f"),
    "training_seconds": ("training seconds", ",.0f"), "memory_mib": ("peak memory, MiB", ",.0f"),
    "trainable": ("trainable parameters", ",.0f"), "parameters": ("parameters", ",.0f"), "compute": ("FLOP", ".3g"),
}  # fmt: skip


def figure(line: Mapping[str, Any], name: str, at: str) -> float | None:
    """A figure of a run: at its last validation, or at the best, that of least loss; None where it has none."""
    curve = line.get("curve", {})
    if name == "compute" and "tokens" in curve:
        return 6 * line.get("parameters", 0) * figure(line, "tokens", at)
    if name not in curve:
        return line.get("test", {}).get(name, line.get(name))
    losses = curve.get("val/loss", curve[name])
    return curve[name][-1 if at == "last" else losses.index(min(losses))]


def collect(comparison: Comparison, results: Results) -> Values:
    """Every figure that is reported or drawn."""
    names = {*comparison.report, comparison.metric["name"], "compute"}
    values: dict[str, dict[str, dict[int, float]]] = {row: {name: {} for name in names} for row in results}
    for row, name in itertools.product(results, names):
        for line in results[row]:
            if (value := figure(line, name, comparison.at)) is not None:
                values[row][name][line["seed"]] = value
    return values


def cell(values: Sequence[float], form: str) -> str:
    """`mean ± standard deviation`, without the second where all seeds agree."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return (f"{mean(values):{form}}" if values else "") + (f" ± {deviation:{form}}" if deviation else "")


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], form: str = ".4f") -> str:
    """Ours less theirs, by seed: the mean of the pairs and its standard error, and whether it may be chance, which it
    may where the interval that holds the true difference in 95 of 100 cases (Student's t) holds 0."""
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(pairs) < 2:
        return f"{pairs[0]:+{form}}, one seed" if pairs else ""
    from scipy.stats import t

    middle, error = mean(pairs), stdev(pairs) / math.sqrt(len(pairs))
    noise = ", within the noise" if abs(middle) <= t.ppf(0.975, len(pairs) - 1) * error else ""
    return f"{middle:+{form}} ± {error:{form}}{noise}"


def table(comparison: Comparison, results: Results, values: Values) -> list[list[str]]:
    """Header and rows: figures with their spread, the difference from the baseline, and what each row shows."""
    columns = {name: TITLES.get(name, (name, ".4g")) for name in comparison.report}
    judged, base = comparison.metric["name"], comparison.baseline
    title, form = TITLES.get(judged, (judged, ".4g"))
    titles, forms = zip(*columns.values(), strict=True)
    rows = [["group", "row", *titles, f"{title} less that of {base}", "seeds", "what it shows"]]
    for row in comparison.rows:
        cells = [cell([*values[row.name][name].values()], shape) for name, (_, shape) in columns.items()]
        apart = difference(values[row.name][judged], values[base][judged], form) if base not in (None, row.name) else ""
        failed = {
            line["seed"]: f" failed (exit code {line['failed']})" for line in results[row.name] if "failed" in line
        }
        seeds = ", ".join(f"{line['seed']}{failed.get(line['seed'], '')}" for line in results[row.name])
        rows.append([row.group, row.title or row.name, *cells, apart, seeds, row.shows])
    for name, known in comparison.quoted.items():
        cells = [f"{known[n]:{shape}}" if n in known else "" for n, shape in zip(columns, forms, strict=True)]
        rows.append(["", name, *cells, "", "", ""])
    kept = [name in ("row", "seeds") or any(row[i] for row in rows[1:]) for i, name in enumerate(rows[0])]
    return [list(itertools.compress(row, kept)) for row in rows]


def notes_of(comparison: Comparison, results: Results) -> list[str]:
    """What a reader of the table has to know."""
    lines = [line for lines in results.values() for line in lines]
    notes = [f"Mean ± standard deviation over the seeds, at the {comparison.at} validation."]
    if comparison.baseline:
        notes += ["Differences are paired over the seeds, ± standard error; within the noise: at 95 % they may be 0."]
    notes += dict.fromkeys(f"Judged by {line['evaluated']}." for line in lines if "evaluated" in line)
    if len({line.get("tokenizer") for line in lines}) > 1:
        notes += [
            "Tokenizers differ: bits per byte compare, losses of a token do not; equal tokens are not equal text."
        ]
    return notes


def show(comparison: Comparison, results: Results, out: Path) -> None:
    """Print the table, and write it as Markdown, CSV and JSON lines beside a plot and the page of the runs."""
    folder, values = out / comparison.name, collect(comparison, results)
    folder.mkdir(parents=True, exist_ok=True)
    (header, *rows), notes = table(comparison, results, values), notes_of(comparison, results)
    scores = {row: mean(found) for row in values if (found := values[row][comparison.metric["name"]].values())}
    pick = {"minimize": min, "maximize": max}[comparison.metric["goal"]]
    best = pick(scores, key=scores.get) if scores else None
    printed = Table(title=comparison.name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, *cells in zip(header, *rows, strict=True):  # narrow, since a pipe has 80 columns
        printed.add_column(name, overflow="fold", min_width=max(map(len, " ".join([name, *cells]).split())))
    for name, row in zip([*results, *comparison.quoted], rows, strict=True):
        printed.add_row(*row, style="bold green" if name == best else None)
    console.print(printed, "\n".join(notes), sep="\n")
    file = folder / comparison.name
    text = [f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows)]
    file.with_suffix(".md").write_text("".join([*text, *(f"\n{note}\n" for note in notes)]), encoding="utf-8")
    with file.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    lines = [json.dumps({"row": row, **line}) for row, lines in results.items() for line in lines]
    file.with_suffix(".jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    draw(comparison, results, values, file.with_suffix(".png"))
    runs = {out / "runs" / lines[0]["key"]: row for row, lines in results.items() if lines[0].get("environment")}
    if runs := {
        run: row for run, row in runs.items() if (run / "metrics.csv").is_file()
    }:  # not those of other machines
        write_report(list(runs), folder, list(runs.values()))
    console.print(f"written: tables, plot and page in {folder}; the runs in {out / 'runs'}")


def draw(comparison: Comparison, results: Results, values: Values, file: Path) -> None:
    """The metric: of each row with every seed, against tokens and time, or against compute with a fitted line."""
    import numpy as np
    from matplotlib.figure import Figure

    metric, kind = comparison.metric["name"], comparison.plot
    groups = dict.fromkeys(row.group for row in comparison.rows)
    picture = Figure(figsize=(9, 0.3 * len(results) + 1.2 if kind == "rows" else 4.2), layout="constrained")
    panels = picture.subplots(1, 2 if kind == "curves" else 1, sharey=True, squeeze=False)[0]
    title = TITLES.get(metric, (metric, ""))[0]
    panels[0].set(**{"xlabel" if kind == "rows" else "ylabel": title})
    if kind == "rows":
        colors = dict(zip(groups, COLORS * len(groups), strict=False))
        for place, row in enumerate(comparison.rows):
            found, color = [*values[row.name][metric].values()], colors[row.group]
            panels[0].plot(found, [place] * len(found), "o", color=color, markersize=3.5, alpha=0.6)
            if found:
                spread = stdev(found) if len(found) > 1 else 0.0
                panels[0].errorbar(mean(found), place, xerr=spread, fmt="|", color=color, markersize=12, capsize=3)
        base = values[comparison.baseline][metric].values() if comparison.baseline else ()
        for mark in [*({mean(base)} if base else ()), *(q[metric] for q in comparison.quoted.values() if metric in q)]:
            panels[0].axvline(mark, color="gray", linewidth=0.8)
        panels[0].set_yticks(range(len(results)), [row.title or row.name for row in comparison.rows])
        panels[0].invert_yaxis()
    elif kind == "curves":
        for color, (row, lines) in zip(COLORS * len(results), results.items(), strict=False):
            for number, curve in enumerate(line["curve"] for line in lines if metric in line.get("curve", {})):
                for axes, along in zip(panels, ("tokens", "training_seconds"), strict=True):
                    axes.plot(curve[along], curve[metric], ".-", color=color, label=None if number else row)
                    axes.set_xlabel(along.replace("_", " "))
    else:
        for color, group in zip(COLORS * len(groups), groups, strict=False):
            rows = [values[row.name] for row in comparison.rows if row.group == group]
            found = [(row["compute"][seed], row[metric][seed]) for row in rows for seed in row[metric]]
            compute, measured = np.array(found).reshape(-1, 2).T
            panels[0].loglog(compute, measured, "o", color=color)
            if len(set(compute)) > 1:
                slope, level = np.polyfit(np.log(compute), np.log(measured), 1)
                label = f"{group}: C^{slope:.3f}"
                panels[0].loglog(compute, np.exp(level) * compute**slope, color=color, label=label)
        panels[0].yaxis.set_minor_formatter("{x:g}")
        panels[0].set_xlabel("C = 6 x parameters x tokens, FLOP")
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)
    picture.savefig(file, dpi=150)
