"""``tinylab report RUN [RUN …]``: a page that shows what a run did, or how several compare.

The page is one file that works offline: curves to hover over (Plotly, with its script embedded), samples during
training, a classifier's predictions, the configuration, the commands and the machine. PNGs of the main curves are
written next to it.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from experiment.command_parser import CommandParser, one_line_errors
from experiment.console import console
from experiment.errors import InputError
from experiment.pages.curves import CHARTS, COLORS, Rows, draw_interactive, draw_png, find_series
from experiment.pages.predictions import draw_calibration, draw_confusion, draw_pngs, read_verdicts
from experiment.pages.summary import FIGURES, best, read_lines, read_metrics
from experiment.runs.provenance import read_record
from experiment.wording import MEANINGS

if TYPE_CHECKING:
    import plotly.graph_objects as go

PAGE = "report.html"
ROUNDS = 6  # samples shown at first; the others unfold
# Plotly's template, and the page's own colors for text, lines and cards.
THEMES = {
    "light": ("plotly_white", "#1f2328", "#d9dde3", "#ffffff"),
    "dark": ("plotly_dark", "#d7dbe0", "#343a43", "#181c22"),
}


class Run:
    """A run folder's contents, as shown on the page; an InputError if the folder is not a run."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.rows: Rows = read_metrics(folder)
        self.record, self.verdicts = read_record(folder), read_verdicts(folder)
        config, decoding = folder / "config.yaml", folder / "decoding.json"
        self.config_text = config.read_text(encoding="utf-8") if config.is_file() else ""
        # The results of `tinylab decoding`, if it was run.
        self.decoding = json.loads(decoding.read_text(encoding="utf-8")) if decoding.is_file() else []

    @property
    def options(self) -> dict[str, str]:
        """The configuration as ``{"model.decoder.num_layers": "4"}``."""
        return dict(_flat(yaml.safe_load(self.config_text) or {}))

    @property
    def figures(self) -> list[dict[str, str]]:
        """The tiles at the top of the page: name, value and note of each."""
        found = []
        for name in FIGURES:
            if (value := best(self.rows, name)) is not None:
                step = next(int(row["step"]) for row in self.rows if row.get(name) == value)
                found.append({"name": name, "value": f"{value:.4g}", "note": f"best, at step {step:,}"})
        steps, tokens = self._last("step"), self._last("train/tokens")
        note = f"{short(tokens)} tokens" if tokens else ""
        found.append({"name": "steps", "value": f"{int(steps or 0):,}", "note": note})
        if speeds := [row["train/tokens_per_second"] for row in self.rows if "train/tokens_per_second" in row]:
            found.append({"name": "tokens per second", "value": f"{median(speeds):,.0f}", "note": "median"})
        if counts := self.record.get("parameters"):
            share = "all trained"
            if counts["trainable"] != counts["total"]:
                share = f"{short(counts['trainable'])} of them trained"
            found.append({"name": "parameters", "value": short(counts["total"]), "note": share})
        seconds = [call["seconds"] for call in self.record.get("calls", []) if "seconds" in call]
        if seconds:
            found.append({"name": "time", "value": duration(sum(seconds)), "note": "with validation"})
        return found

    def _last(self, name: str) -> float | None:
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    @property
    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """The stories by prompt, in the order of their steps."""
        found: dict[str, list[dict[str, Any]]] = {}
        for sample in read_lines(self.folder / "samples.jsonl"):
            rest = sample["story"].removeprefix(sample["prompt"])
            found.setdefault(sample["prompt"], []).append({**sample, "rest": rest})
        return found


def _flat(config: dict[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)


def short(number: float) -> str:
    """1228800 as 1.23 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """3725 as 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spread(items: Sequence[Any], most: int = ROUNDS) -> list[Any]:
    """At most `most` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_runs(folders: Sequence[Path], names: Sequence[str] = ()) -> list[Run]:
    """The runs under the given names, or under unique ones.

    Raises:
        InputError: A folder is no run, or was given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := [folder for i, folder in enumerate(folders) if resolved[i] in resolved[:i]]:
        raise InputError(f"run {twice[0]} was given twice: give each run once")
    if not names:
        short = [path.name for path in resolved]
        names = [path.name if short.count(path.name) == 1 else f"{path.parent.name}/{path.name}" for path in resolved]
    return [Run(name, folder) for name, folder in zip(names, folders, strict=True)]


def write_report(folders: Sequence[Path], folder: Path | None = None, names: Sequence[str] = ()) -> Path:
    """Write the page and the PNGs of one run to its folder, or of several to a folder next to the first.

    Args:
        folders: Of the runs.
        folder: Where to write instead.
        names: Of the runs on the page; by default those of their folders.

    Returns:
        The page.

    Raises:
        InputError: A folder is no run, or the page cannot be written.
    """
    runs = read_runs(folders, names)
    if folder is None:
        folder = folders[0]
        if len(runs) > 1:
            folder = folders[0].parent / "-".join(["compare", *(run.name.replace("/", "-") for run in runs)])[:120]
    charts, figures = [], {}
    try:
        pictures = folder / "figures"
        pictures.mkdir(parents=True, exist_ok=True)
        for chart in CHARTS:
            if series := find_series({run.name: run.rows for run in runs}, chart):
                charts.append(chart)
                figures[chart.key] = draw_interactive(series, chart)
                if chart.paper:
                    draw_png(series, chart, pictures / f"{chart.key}.png")
        for place, run in enumerate(runs):
            if run.verdicts is not None:
                figures[f"confusion-{place}"] = draw_confusion(run.verdicts)
                figures[f"calibration-{place}"] = draw_calibration(run.verdicts)
                if len(runs) == 1:
                    draw_pngs(run.verdicts, pictures)
        partial = folder / f"{PAGE}.partial"
        partial.write_text(render(runs, charts, figures), encoding="utf-8", errors="replace")
        partial.replace(folder / PAGE)
    except OSError as error:
        raise InputError(
            f"{folder / PAGE} cannot be written ({error.strerror}): free space, or choose another folder with --output"
        ) from error
    return folder / PAGE


def render(runs: list[Run], charts: Sequence[Any], figures: dict[str, "go.Figure"]) -> str:
    """The page's HTML. All text of the runs is escaped by the template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {"spread": spread, "zip": zip}
    templates.globals |= {"duration": duration, "short": short}
    options = {run.name: run.options for run in runs}
    keys = dict.fromkeys(key for known in options.values() for key in known)
    names = list(dict.fromkeys(tile["name"] for run in runs for tile in run.figures))
    differing = [key for key in keys if len({known.get(key) for known in options.values()}) > 1]
    return templates.get_template("report.html").render(
        runs=runs,
        charts=charts,
        smoothed=any(trace.hoverinfo == "skip" for chart in charts for trace in figures[chart.key].data),
        tokens_known=all("train/tokens" in set().union(*run.rows) for run in runs),
        options=options,
        colors=COLORS,
        differing=differing,
        names=names,
        meanings={name: MEANINGS[figure] for name in names if (figure := name.partition("/")[2]) in MEANINGS},
        prompts=list(dict.fromkeys(prompt for run in runs for prompt in run.samples)),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),  # 4.7 MB, compressed to 1.9
        figures={key: Markup(_json(figure)) for key, figure in figures.items()},
        themes={name: Markup(_theme(*look)) for name, look in THEMES.items()},
    )


def _json(figure: "go.Figure") -> str:
    """Plotly's JSON of data and layout, without its default template, safe inside a script element."""
    figure.layout.template = None
    return figure.to_json(remove_uids=True).replace("<", "\\u003c")


def _theme(template: str, text: str, lines: str, card: str) -> str:
    """One of Plotly's own templates, on the page's background."""
    import plotly.graph_objects as go
    from plotly.io import templates

    nothing, axis = "rgba(0,0,0,0)", dict.fromkeys(("gridcolor", "linecolor", "zerolinecolor"), lines)
    axis |= {"spikecolor": text, "spikedash": "dot", "spikethickness": -2}  # below 0: without a second line around it
    layout = go.Layout(templates[template].layout).update(
        paper_bgcolor=nothing, plot_bgcolor=nothing, font_color=text, xaxis=axis, yaxis=axis,
        modebar={"bgcolor": nothing, "color": lines, "activecolor": text},
        hoverlabel={"bgcolor": card, "bordercolor": lines, "font": {"color": text}},
    )  # fmt: skip
    return json.dumps({"layout": layout.to_plotly_json()}).replace("<", "\\u003c")


@one_line_errors()
def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    parser = CommandParser("tinylab report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/demo/lm")
    parser.add_argument("--output", type=Path, help="folder to write to; by default the run's own")
    options = parser.parse_args(args)
    with console.status("writing the report"):
        page = write_report(options.runs, options.output)
    console.print(f"written: {page}, and PNGs in {page.parent / 'figures'}")
    console.print("open it in any browser; it needs no network")


if __name__ == "__main__":
    main()
