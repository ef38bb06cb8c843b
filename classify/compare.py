"""The report's Table 1 and its gap explained: many runs of `python -m classify fit`, one at a time, side by side.

    python -m classify.compare table1   [--seeds 1 2 3] [--only custom peft] [--out FOLDER] [flags of classify fit]
    python -m classify.compare ablation [--seeds 1]     [--only rate mask]   [--out FOLDER] [flags of classify fit]

Each run is a process of its own, so that its peak memory can be read, and leaves one line in results.jsonl; what is
there is not run again, and a run that was cut short goes on from its last checkpoint. The tables are made from these
lines: printed, as Markdown, CSV and a plot.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from rich.table import Table

from experiment.errors import InputError
from experiment.progress import console
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
        "The usual rate of full fine-tuning is too small for adapters, even in six epochs.",
    ),
    "rate_two_epochs": Contender(
        "learning rate 5e-5, two epochs", "custom", (SMALL_RATE,),
        "At that rate two epochs end before B has grown away from zero: this alone is the report's gap.",
    ),
    "scaling": Contender(
        "no alpha / r scaling", "custom", ("--model.lora_alpha={r}",),
        "A missing factor of 2 acts like a smaller rate, which Adam at the right rate makes up for.",
    ),
    "random_b": Contender(
        "B not zero", "custom", ("--model.init_lora_weights=false",),
        "Training starts from a disturbed encoder instead of the pretrained one.",
    ),
    "frozen_head": Contender(
        "frozen classifier head", "custom", ("--model.modules_to_save=[]",),
        "The adapters must bend the features towards a random head that can't move.",
    ),
    "eval_mode": Contender(
        "model left in eval mode", "custom", ("--model.dropout_active=false",),
        "Without dropout the training loss falls lower; two epochs are too few for much overfitting.",
    ),
    "mask": Contender(
        "missing attention mask", "custom", ("--model.ignore_padding=false", "--data.padding=max_length"),
        "Padded positions are read as text; the shorter the review, the more they drown it.",
    ),
    "beginning": Contender(
        "only the beginning read", "custom", ("--data.truncation=head",),
        "Reviews give their verdict at the end, which is cut off.",
    ),
    "report": Contender("all of the report's settings", "report", (), "The report's configuration as a whole."),
}  # fmt: skip


class Comparison:
    """Runs contenders over seeds and keeps what they gave in `out`/results.jsonl."""

    def __init__(self, contenders: dict[str, Contender], seeds: Sequence[int], out: Path, flags: Sequence[str]) -> None:
        self.contenders, self.seeds, self.out, self.flags = contenders, seeds, out, list(flags)
        self.results = out / "results.jsonl"

    def arguments(self, contender: Contender, seed: int) -> list[str]:
        """What follows `python -m classify fit`; flags given by hand win over the configuration, and a contender's
        own over these."""
        config = CONFIGS / f"{contender.config or 'custom'}.yaml"
        own = contender.flags
        if any("{r}" in flag for flag in own):
            rank = next((flag.partition("=")[2] for flag in self.flags if flag.startswith("--model.r=")), None)
            own = [flag.format(r=rank or yaml.safe_load(read_config(config))["model"]["r"]) for flag in own]
        return [f"--config={config}", *self.flags, *own, f"--seed_everything={seed}"]

    def key(self, name: str, seed: int) -> str:
        arguments = self.arguments(self.contenders[name], seed)
        texts = [read_config(a.removeprefix("--config=")) for a in arguments if a.startswith("--config=")]
        configs = [yaml.safe_load(text) for text in texts]  # without comments, which change no result
        digest = hashlib.sha256(json.dumps([arguments, configs]).encode()).hexdigest()
        return f"{self.contenders[name].config or name}-seed{seed}-{digest[:8]}"  # equal runs are made once

    def lines(self) -> dict[str, dict[str, Any]]:
        """Finished runs by key."""
        if not self.results.is_file():
            return {}
        whole = [line for line in self.results.read_text().split("\n") if line.endswith("}")]  # a kill may cut one
        return {line["key"]: line for line in map(json.loads, whole)}

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """Run what is missing; returns each contender's results, one a seed."""
        self.out.mkdir(parents=True, exist_ok=True)
        runs = [(seed, name) for seed in self.seeds for name in self.contenders]
        for number, (seed, name) in enumerate(runs, 1):
            contender, key = self.contenders[name], self.key(name, seed)
            done = key in self.lines()
            before = " (done before)" if done else ""
            console.print(f"[bold]run {number} of {len(runs)}[/bold]: {contender.title}, seed {seed}{before}")
            if done:
                continue
            run = bag_of_words if contender.config is None else fit_and_test
            figures = run(self.arguments(contender, seed), self.out / "runs" / key)
            with self.results.open("a") as file:
                file.write("\n" + json.dumps({"key": key, "name": name, "seed": seed, **figures}))
        lines = self.lines()
        return {name: [lines[self.key(name, seed)] for seed in self.seeds] for name in self.contenders}


def read_config(path: str | Path) -> str:
    if not Path(path).is_file():
        raise InputError(f"the configuration {path} does not exist: run this from the folder that holds configs/")
    return Path(path).read_text(encoding="utf-8")


def fit_and_test(arguments: list[str], run_dir: Path) -> dict[str, float | None]:
    """Train in a process of its own, or go on where one stopped; then test the best checkpoint here."""
    resumed = (run_dir / "checkpoints" / "last.ckpt").exists()
    command = [sys.executable, "-m", "classify", "fit", *arguments]
    command += [f"--run_dir={run_dir}", "--ckpt_path=last", "--checkpoint.every_n_steps=128"]
    environment = os.environ | {"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or run_dir.parent.parent.name}
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise InputError(f"the run {run_dir} ended with exit code {process.returncode}: see above; {' '.join(command)}")
    seconds = time.monotonic() - start

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
        "seconds": None if resumed else seconds,
        "cpu_seconds": None if resumed else usage.ru_utime + usage.ru_stime,  # comparable on a busy machine too
        "memory_mib": usage.ru_maxrss / 1024 if sys.platform != "darwin" else usage.ru_maxrss / 2**20,
    }


def test(run_dir: Path) -> tuple[float, int]:
    """Test accuracy of a run's best checkpoint, and the number of parameters it trained."""
    from classify.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()):
        cli = main(["test", f"--config={run_dir / 'config.yaml'}", "--ckpt_path=best", f"--run_dir={run_dir}"])
    return float(cli.trainer.callback_metrics["test/accuracy"]), cli.model.parameter_counts()[0]


def bag_of_words(arguments: list[str], run_dir: Path) -> dict[str, float | None]:
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


# ---------------------------------------------------------------------------------------------------- the tables


def spread(lines: list[dict[str, Any]], figure: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the seeds; None where there is nothing to take it of."""
    values = [line[figure] for line in lines if line.get(figure) is not None]
    return (mean(values) if values else None), (stdev(values) if len(values) > 1 else None)


def cell(lines: list[dict[str, Any]], figure: str) -> str:
    middle, deviation = spread(lines, figure)
    form = COLUMNS[figure][1]
    if middle is None:
        return ""
    same = deviation is None or figure == "trainable"
    return f"{middle:{form}}" if same else f"{middle:{form}} ± {deviation:{form}}"


def table1_rows(results: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    rows = [[TABLE1[name].title, *(cell(lines, figure) for figure in COLUMNS)] for name, lines in results.items()]
    rows += [[title, *(cell([figures], figure) for figure in COLUMNS)] for title, figures in REPORTED.items()]
    return ["approach", *(title for title, _ in COLUMNS.values())], rows


def ablation_rows(results: dict[str, list[dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    right, _ = spread(results["right"], "val_accuracy") if "right" in results else (None, None)
    rows = []
    for name, lines in results.items():
        accuracy, _ = spread(lines, "val_accuracy")
        difference = "" if right is None or name == "right" else f"{100 * (accuracy - right):+.1f}"
        figures = [cell(lines, "val_loss"), cell(lines, "val_accuracy")]
        rows.append([ABLATION[name].title, *figures, difference, ABLATION[name].shows])
    return ["switch", "validation loss", "accuracy", "points", "what it shows"], rows


def write_tables(name: str, out: Path, header: list[str], rows: list[list[str]]) -> None:
    """Print the table, and write it as Markdown and CSV."""
    table = Table(*header, title=name, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [header, ["---"] * len(header), *rows]
    (out / f"{name}.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def plot(name: str, out: Path, contenders: dict[str, Contender], results: dict[str, list[dict[str, Any]]]) -> None:
    """Accuracy of each contender: the mean over seeds, every seed as a dot, and the source report's two figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = [contenders[key].title for key in results]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(titles) + 1.6), layout="constrained")
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
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(out / f"{name}.png", dpi=150)
    pyplot.close(figure)


def main(args: Sequence[str] | None = None) -> None:
    """Run a comparison; flags that are not its own go to every `classify fit`."""
    # As Ctrl-C does: the run in progress is told to save and stop, so that the same command goes on from there.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser("python -m classify.compare", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("table", choices=["table1", "ablation"])
    parser.add_argument("--seeds", type=int, nargs="+", help="one run each (table1: 1 2 3, ablation: 1)")
    parser.add_argument("--only", nargs="+", help="rows to make, by default all")
    parser.add_argument("--out", type=Path, help="folder of results and tables, by default runs/compare/<table>")
    options, flags = parser.parse_known_args(args)
    every = TABLE1 if options.table == "table1" else ABLATION
    out = options.out or Path("runs/compare") / options.table
    seeds = options.seeds or ([1, 2, 3] if options.table == "table1" else [1])
    try:
        if unknown := [name for name in options.only or () if name not in every]:
            raise InputError(f"--only {unknown[0]}: there is no such row; expected some of {', '.join(every)}")
        if any(flag in ("--run_dir", "--ckpt_path", "--seed_everything") for flag in flags):
            raise InputError("--run_dir, --ckpt_path and --seed_everything are set for each run: use --out and --seeds")
        contenders = {name: every[name] for name in options.only or every}
        results = Comparison(contenders, seeds, out, joined(flags)).run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    header, rows = (table1_rows if options.table == "table1" else ablation_rows)(results)
    write_tables(options.table, out, header, rows)
    plot(options.table, out, contenders, results)
    console.print(f"tables, plot and every run lie in {out}")


def joined(flags: list[str]) -> list[str]:
    """`--name value` as `--name=value`."""
    result: list[str] = []
    for flag in flags:
        if not flag.startswith("--") and result and "=" not in result[-1]:
            result[-1] += f"={flag}"
        else:
            result.append(flag)
    return result


if __name__ == "__main__":
    main()
