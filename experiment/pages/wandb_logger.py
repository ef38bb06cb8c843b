"""Weights & Biases: a run's dashboard, online or kept in the run's folder until ``wandb sync``."""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from experiment.compat.wandb import is_logged_in
from experiment.console import console
from experiment.errors import InputError
from experiment.extras import require
from experiment.pages.predictions import SOURCES, read_verdicts
from experiment.pages.summary import FIGURES, best, read_metrics
from experiment.runs.loggers import RunLogger

if TYPE_CHECKING:
    import wandb

STEP, TOKENS = "trainer/global_step", "tokens"
RUN_ID = "wandb/run-id.txt"  # in the run's folder: a resumed training continues the same W&B run


class WandbLogger(RunLogger):
    """One row for each optimizer step and one W&B run for each run.

    Lightning's own logger lets W&B count its calls, so that training and validation metrics of a step are in
    different rows, and a resumed run starts over (pytorch-lightning#5469, #13163). Here a row of W&B's history is an
    optimizer step and also holds the tokens seen so far, for the other axis. A resumed run continues after the step it
    resumed from; what the killed part logged after it is not logged again, since it would be identical.
    """

    def __init__(
        self,
        project: str = "tinylab",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        offline: bool | None = None,
        log_model: bool = False,
        save_dir: str | None = None,
        id: str | None = None,
    ) -> None:
        """
        Args:
            project: The W&B project.
            name: Of the run; by default the package and the run's folder, such as lm/demo.
            group: Runs that belong together, such as the seeds of a comparison.
            tags: To find the run by.
            offline: Keep everything in the run's folder for `wandb sync`. null: offline unless logged in.
            log_model: Save the best checkpoint, and the adapter if there is one, as artifacts.
            save_dir: Where W&B's files go; by default the run's folder.
            id: Of the W&B run; by default a new one, or the resumed run's.
        """
        super().__init__()
        self.options = {"project": project, "group": group, "tags": tags}
        self.run_name, self.run_id, self.folder = name, id, save_dir
        self.mode = {None: None, True: "offline", False: "online"}[offline]
        self.log_model = log_model
        self.experiment: wandb.Run | None = None  # under the name that Lightning's loggers give it

    @rank_zero_only
    def check(self) -> None:
        """Check whether the user is logged in at the server, including a private one."""
        require("wandb", "wandb")
        if self.mode != "offline":
            self.mode = os.environ.get("WANDB_MODE", self.mode)
        if self.mode not in ("online", None):
            return
        import wandb

        server = wandb.setup().settings.base_url
        try:
            logged_in = is_logged_in(server)
        except wandb.errors.Error as error:  # a malformed key
            raise InputError(f"W&B at {server}: {error}; log in with: wandb login --relogin") from error
        if not logged_in and self.mode == "online":
            cure = "log in with: wandb login, or set WANDB_MODE=offline"
            raise InputError(f"W&B: you are not logged in at {server}; {cure}")
        self.mode = "online" if logged_in else "offline"

    @rank_zero_only
    def begin(self, trainer: Trainer, run: Path, package: str, record: Mapping[str, Any], step: int) -> None:
        import wandb

        super().begin(trainer, run, package, record, step)
        os.environ.pop("WANDB_SERVICE", None)  # of the parent process, which may have ended
        (run / "wandb").mkdir(parents=True, exist_ok=True)  # else wandb falls back to a temporary folder
        file = run / RUN_ID
        if self.run_id is None:
            known = file.read_text(encoding="utf-8").strip() if file.exists() else secrets.token_hex(4)
            self.run_id = os.environ.get("WANDB_RUN_ID", known)  # which the agent of a sweep sets
        file.write_text(f"{self.run_id}\n", encoding="utf-8")
        if self.mode in ("offline", "dryrun"):
            # Resuming needs the server; `wandb sync` joins the parts by their id. A line at the end says how.
            how = {"mode": "offline", "settings": wandb.Settings(silent=True)}
        else:
            how = {"mode": self.mode, "resume": "allow"}
        name, folder = self.run_name or f"{package}/{run.name}", self.folder or str(run)
        self.experiment = wandb.init(name=name, id=self.run_id, dir=folder, **self.options, **how)
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        shown = {name: record[name] for name in ("parameters", "environment")}
        shown["command"] = record["calls"][-1]["command"]
        self.experiment.config.update({**config, **shown}, allow_val_change=True)
        for axis in (STEP, TOKENS):
            self.experiment.define_metric(axis)
        self.experiment.define_metric("*", step_metric=STEP, step_sync=True)
        for metric, better in FIGURES.items():
            self.experiment.define_metric(metric, step_metric=STEP, step_sync=True, summary=better.__name__)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row, step = dict(metrics), self.trainer.global_step
        tokens = self.trainer.callback_metrics.get("train/tokens")
        if tokens is not None:
            row[TOKENS] = float(tokens)
        self.experiment.log({**row, STEP: step}, step=step)

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self.log_metrics({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    @rank_zero_only
    def end(self, run: Path) -> None:
        """Log a classifier's predictions and, if requested, the weights, and finish."""
        import wandb

        if (verdicts := read_verdicts(run, SOURCES[:1])) is not None:
            self.log_table("predictions", *verdicts.table())
            truth, predicted, names = verdicts.truth.tolist(), verdicts.predicted.tolist(), verdicts.names
            matrix = wandb.plot.confusion_matrix(y_true=truth, preds=predicted, class_names=names, title="Confusion")
            self.log_metrics({"confusion": matrix})
        if self.log_model:
            for kind, path in (("model", run / "checkpoints" / "best.ckpt"), ("adapter", run / "adapter")):
                if path.exists():
                    artifact = wandb.Artifact(f"{kind}-{self.run_id}", type=kind)
                    artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
                    self.experiment.log_artifact(artifact)
        # W&B has summarized only the last part of a resumed run. The row in progress would be summarized after this.
        self.experiment.log({}, commit=True)
        rows = read_metrics(run)
        for metric, better in FIGURES.items():
            if (value := best(rows, metric)) is not None:
                self.experiment.summary[metric] = {better.__name__: value}
        offline = self.experiment.offline
        self.experiment.finish()
        if offline:
            console.print(f"W&B was offline; upload the run with: wandb sync {run / 'wandb' / 'offline-run-*'}")
        self.experiment = None
