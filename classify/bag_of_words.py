"""A simple baseline: tf-idf of single words and logistic regression on the same reviews, untruncated.

    python -m classify.bag_of_words fit --run_dir FOLDER [--config FILE ...] [--data.OPTION VALUE ...]

As a row of a comparison it accepts the flags of `tinylab classify fit`; only those of `data` have an effect.
"""

import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from classify.data import TextClassificationDataModule
from classify.splits import draw_splits
from experiment.sources.fit_arguments import merged, read_words


def main(args: Sequence[str] | None = None) -> None:
    """Fit, and write metrics.csv and run.json to the folder, as a training run does."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline

    configs, flags = read_words((sys.argv[1:] if args is None else args)[1:])
    data = TextClassificationDataModule(**merged(configs, flags).get("data", {}))
    _, drawn = draw_splits(data.path, data.sizes, data.given_label_names, data.seed)
    start = time.monotonic()
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
    model.fit(drawn["train"].texts, drawn["train"].labels)
    figures: dict[str, float] = {"step": 1}
    for name, split in {"train": drawn["train"], "val": drawn["validation"], "test": drawn["test"]}.items():
        figures[f"{name}/loss"] = log_loss(split.labels, model.predict_proba(split.texts))
        figures[f"{name}/accuracy"] = model.score(split.texts, split.labels)
    run, size = Path(flags["run_dir"]), model[-1].coef_.size + model[-1].intercept_.size
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([figures, figures.values()])
    record = {"parameters": {"trainable": size, "total": size}, "calls": [{"seconds": time.monotonic() - start}]}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
