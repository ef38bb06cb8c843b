"""The report's Table 1 and its gap explained: many runs of `python -m classify fit`, one at a time, side by side.

    python -m classify.compare table1   [--seeds 1 2 3] [--only custom peft] [--out FOLDER] [flags of classify fit]
    python -m classify.compare ablation [--seeds 1]     [--only rate mask]   [--out FOLDER] [flags of classify fit]

What is done is not run again; the tables are printed, and written as Markdown, CSV and a plot.
"""

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from experiment.comparison import (
    Line,
    Parser,
    Run,
    cells,
    command_line,
    fit,
    fit_flags,
    make_runs,
    read_config,
    spread,
    write_table,
)
from experiment.console import console
from experiment.errors import InputError
from experiment.summary import read_metrics

CONFIGS = Path("configs/classify")
COLUMNS = {  # name of a figure: title of its column, format
    "train_loss": ("training loss", ".4f"),
    "val_loss": ("validation loss", ".4f"),
    "val_accuracy": ("accuracy", ".4f"),
    "test_accuracy": ("test accuracy", ".4f"),
    "trainable": ("trainable parameters", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "memory_mib": ("peak memory, MiB", ",.0f"),
}
REPORTED = {
    "source report, its own LoRA": {"train_loss": 0.6750, "val_loss": 0.6575, "val_accuracy": 0.633},
    "source report, PEFT": {"train_loss": 0.6332, "val_loss": 0.6183, "val_accuracy": 0.668},
}


@dataclass(frozen=True)
class Contender:
    """One row: its title, the configuration it starts from (None: bag of words), the flags that make it different,
    and for the ablation what it shows."""

    title: str
    config: str | None
    flags: tuple[str, ...] = ()
    shows: str = ""


TABLE1 = {
    "custom": Contender("LoRA by hand", "custom"),
    "peft": Contender("LoRA by PEFT", "peft"),
    "head": Contender("frozen encoder, head only", "head"),
    "full": Contender("full fine-tuning", "full"),
    "words": Contender("bag of words, logistic regression", None),
}
SMALL_RATE = "--model.learning_rate=5e-5"
ABLATION = {
    "right": Contender("as it should be", "custom", (), "What the others are measured against."),
    "rate": Contender(
        "learning rate 5e-5", "custom", (SMALL_RATE, "--trainer.max_epochs=6"),
        "Three times as many epochs make up for most of it: what a rate so small lacks is steps.",
    ),
    "rate_two_epochs": Contender(
        "learning rate 5e-5, two epochs", "custom", (SMALL_RATE,),
        "At that rate two epochs end before B has grown away from zero: most of the report's gap by itself.",
    ),
    "scaling": Contender(
        "no alpha / r scaling", "custom", ("--model.lora_alpha={r}",),
        "A missing factor of 2 acts like a smaller rate, which Adam at the right rate makes up for.",
    ),
    "random_b": Contender(
        "B not zero", "custom", ("--model.init_lora_weights=false",),
        "Training starts from a disturbed encoder, not the pretrained one, and recovers.",
    ),
    "frozen_head": Contender(
        "frozen classifier head", "custom", ("--model.modules_to_save=[]",),
        "The adapters turn the features towards a random head that can't move: nothing is lost.",
    ),
    "eval_mode": Contender(
        "model left in eval mode", "custom", ("--model.dropout_active=false",),
        "Without dropout the training loss falls lower; two epochs are too few for much overfitting.",
    ),
    "mask": Contender(
        "missing attention mask", "custom", ("--model.ignore_padding=false", "--data.padding=max_length"),
        "Padded positions are read as text: little harm where few reviews are shorter than max_length.",
    ),
    "beginning": Contender(
        "only the beginning read", "custom", ("--data.truncation=head",),
        "Reviews give their verdict at the end, which is cut off.",
    ),
    "report": Contender(
        "all of the report's settings", "report", (),
        "That rate, half as many steps, of twice as many reviews each, and only the beginning of reviews.",
    ),
}  # fmt: skip


def runs_of(contenders: dict[str, Contender], seeds: Sequence[int], flags: Sequence[str]) -> list[Run]:
    """A run of each contender with each seed; flags given by hand win over the configuration, and a contender's own
    over these."""
    runs = []
    for seed in seeds:
        for name, contender in contenders.items():
            config = CONFIGS / f"{contender.config or 'custom'}.yaml"
            own = contender.flags
            if any("{r}" in flag for flag in own):
                rank = next((flag.partition("=")[2] for flag in flags if flag.startswith("--model.r=")), None)
                own = [flag.format(r=rank or yaml.safe_load(read_config(config))["model"]["r"]) for flag in own]
            arguments = [f"--config={config}", *flags, *own, f"--seed_everything={seed}"]
            runs.append(Run(name, contender.config or name, seed, arguments))
    return runs


def measure(run: Run, run_dir: Path) -> Line:
    """Train, or go on where a training stopped; then test the best checkpoint here."""
    if run.stem == "words":
        return bag_of_words(run.arguments)
    used = fit("classify", [*run.arguments, "--checkpoint.every_n_steps=128"], run_dir)
    rows = read_metrics(run_dir)
    best = min((row for row in rows if "val/loss" in row), key=lambda row: row["val/loss"])
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    tested, trainable = test(run_dir)
    epochs = yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]["max_epochs"] or 1
    return {
        "train_loss": mean(losses[-max(1, len(losses) // max(1, epochs)) :]),  # of the last epoch
        "val_loss": best["val/loss"],
        "val_accuracy": best["val/accuracy"],
        "test_accuracy": tested,
        "trainable": trainable,
        **used,
    }


def test(run_dir: Path) -> tuple[float, int]:
    """Test accuracy of a run's best checkpoint, and the number of parameters it trained."""
    from classify.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()):
        cli = main(["test", f"--config={run_dir / 'config.yaml'}", "--ckpt_path=best", f"--run_dir={run_dir}"])
    return float(cli.trainer.callback_metrics["test/accuracy"]), cli.model.parameter_counts()[0]


def bag_of_words(arguments: Sequence[str]) -> Line:
    """The floor: tf-idf of single words and logistic regression on the same reviews, untruncated."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    from classify.data import IMDB
    from classify.splits import draw_splits

    options: dict[str, Any] = {}
    for name, _, value in (argument.partition("=") for argument in arguments):
        if name == "--config":
            options |= yaml.safe_load(Path(value).read_text()).get("data", {})
        elif name.startswith("--data."):
            options[name.removeprefix("--data.")] = yaml.safe_load(value)
    data = IMDB(**options)
    _, drawn = draw_splits(data.path, data.sizes, data.given_label_names, data.seed)
    train, validation, tested = drawn["train"], drawn["validation"], drawn["test"]
    start = time.monotonic()
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=1000).fit(vectorizer.fit_transform(train.texts), train.labels)
    probabilities = model.predict_proba(vectorizer.transform(validation.texts))
    return {
        "train_loss": log_loss(train.labels, model.predict_proba(vectorizer.transform(train.texts))),
        "val_loss": log_loss(validation.labels, probabilities),
        "val_accuracy": model.score(vectorizer.transform(validation.texts), validation.labels),
        "test_accuracy": model.score(vectorizer.transform(tested.texts), tested.labels),
        "trainable": model.coef_.size + model.intercept_.size,
        "seconds": time.monotonic() - start,
        "memory_mib": None,
    }


def table1_rows(results: dict[str, list[Line]]) -> tuple[list[str], list[list[str]]]:
    rows = [[TABLE1[name].title, *cells(lines, COLUMNS)] for name, lines in results.items()]
    rows += [[title, *cells([figures], COLUMNS)] for title, figures in REPORTED.items()]
    return ["approach", *(title for title, _ in COLUMNS.values())], rows


def ablation_rows(results: dict[str, list[Line]]) -> tuple[list[str], list[list[str]]]:
    columns = {name: COLUMNS[name] for name in ("val_loss", "val_accuracy")}
    right, _ = spread(results["right"], "val_accuracy") if "right" in results else (None, None)
    rows = []
    for name, lines in results.items():
        accuracy, _ = spread(lines, "val_accuracy")
        difference = "" if right is None or name == "right" else f"{100 * (accuracy - right):+.1f}"
        rows.append([ABLATION[name].title, *cells(lines, columns), difference, ABLATION[name].shows])
    return ["switch", *(title for title, _ in columns.values()), "points", "what it shows"], rows


def plot(name: str, out: Path, contenders: dict[str, Contender], results: dict[str, list[Line]]) -> None:
    """Accuracy of each contender: the mean over seeds, every seed as a dot, and the source report's two figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = [contenders[key].title for key in results]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(titles) + 2), layout="constrained")
    for figure_name, offset, color in (("val_accuracy", 0.18, "C0"), ("test_accuracy", -0.18, "C1")):
        label = COLUMNS[figure_name][0].replace("accuracy", "").strip() or "validation"
        middles = [spread(lines, figure_name)[0] for lines in results.values()]
        places = [i - offset for i in range(len(titles))]
        axes.barh(places, middles, height=0.34, color=color, alpha=0.55, label=label)
        for place, lines in zip(places, results.values(), strict=True):
            axes.plot([line[figure_name] for line in lines], [place] * len(lines), ".", color=color)
    for i, (title, figures) in enumerate(REPORTED.items()):
        axes.axvline(figures["val_accuracy"], color="gray", linestyle=("--", ":")[i], linewidth=1, label=title)
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    axes.set_xlim(0.45, 1.0)
    axes.set_xlabel("accuracy")
    figure.legend(fontsize="small", loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(out / f"{name}.png", dpi=150)
    pyplot.close(figure)


def compare(args: Sequence[str] | None) -> None:
    parser = Parser("python -m classify.compare", __doc__)
    parser.add_argument("table", choices=["table1", "ablation"])
    parser.add_argument("--seeds", type=int, nargs="+", help="one run each (table1: 1 2 3, ablation: 1)")
    parser.add_argument("--only", nargs="+", help="rows to make, by default all")
    parser.add_argument("--out", type=Path, help="folder of results and tables, by default runs/compare/<table>")
    options, others = parser.parse_known_args(args)
    every = TABLE1 if options.table == "table1" else ABLATION
    out = options.out or Path("runs/compare") / options.table
    if unknown := [name for name in options.only or () if name not in every]:
        raise InputError(f"--only {unknown[0]}: there is no such row; expected some of {', '.join(every)}")
    contenders = {name: every[name] for name in options.only or every}
    seeds = options.seeds or ([1, 2, 3] if options.table == "table1" else [1])
    results = make_runs(runs_of(contenders, seeds, fit_flags(others)), out, measure)
    header, rows = (table1_rows if options.table == "table1" else ablation_rows)(results)
    write_table(out / options.table, options.table, header, rows)
    plot(options.table, out, contenders, results)
    console.print(f"tables, plot and every run lie in {out}")


def main(args: Sequence[str] | None = None) -> None:
    """Run a comparison; flags that are not its own go to every `classify fit`."""
    with command_line():
        compare(args)


if __name__ == "__main__":
    main()
