"""Weights & Biases: a run's dashboard, online or kept in the run's folder until ``wandb sync``."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from experiment.console import console
from experiment.errors import InputError
from experiment.pages.predictions import SOURCES, read_verdicts
from experiment.pages.summary import FIGURES, best, read_metrics

STEP, TOKENS = "trainer/global_step", "tokens"
RUN_ID = "wandb/run-id.txt"  # in the run's folder: a resumed training goes on with the same W&B run


class WandbLogger(LightningWandbLogger):
    """Lightning's logger, with one row for each optimizer step and one W&B run for each run.

    Lightning lets W&B count its own calls, so that training and validation figures of a step stand in different rows,
    and a resumed run begins anew (pytorch-lightning#5469, #13163). Here a row of W&B's history is an optimizer step,
    holds the tokens seen so far as well, for the other axis, and a resumed run goes on after the step it resumed
    from; what the killed part had logged past it is not logged again, since it would be the same.
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
            offline: Keep everything in the run's folder; `wandb sync` sends it later. null: where nobody is logged in.
            log_model: Keep the best checkpoint, and the adapter where there is one, as artifacts.
            save_dir: Where W&B's files go; by default the run's folder.
            id: Of the W&B run; by default a new one, or that of the run which is resumed.
        """
        super().__init__(
            name=name,
            save_dir=save_dir,
            offline=bool(offline),
            id=id,
            project=project,
            group=group,
            tags=tags,
        )
        self.keeps_model = log_model
        self._chosen = offline
        self.trainer: Trainer | None = None

    @rank_zero_only
    def log_in(self) -> None:
        """Find out whether somebody is logged in at the server, a private one too; to be called before anything is
        written.

        Raises:
            InputError: Nobody is, and the run shall not be kept offline.
        """
        mode = "offline" if self._offline else os.environ.get("WANDB_MODE", "online" if self._chosen is False else None)
        if mode not in ("online", None):
            return
        import wandb
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        server = wandb_setup.singleton().settings.base_url
        try:
            found = wbauth.authenticate_session(host=server, source="tinylab", prompt=False, update_session=False)
        except wandb.errors.Error as error:  # a key of a form that none has
            raise InputError(f"W&B at {server}: {error}; log in with: wandb login --relogin") from error
        if found is None and mode == "online":
            cure = "log in with: wandb login, or set WANDB_MODE=offline"
            raise InputError(f"W&B: nobody is logged in at {server}; {cure}")
        self._offline = found is None

    @rank_zero_only
    def begin(self, trainer: Trainer, run: Path, package: str, record: Mapping[str, Any]) -> None:
        """Start or continue the W&B run; to be called before training.

        Args:
            trainer: Whose steps are counted.
            run: The run's folder, with its config.yaml.
            package: lm or classify.
            record: Of run.json: parameter counts, environment and commands.
        """
        import wandb

        self.trainer = trainer
        os.environ.pop("WANDB_SERVICE", None)  # of the process that started this one, which may have ended since
        self._wandb_init.pop("anonymous", None)  # Lightning passes it, wandb warns that it has no effect
        self._name = self._wandb_init["name"] = self._name or f"{package}/{run.name}"
        if self._save_dir in (None, "."):
            self._save_dir = self._wandb_init["dir"] = str(run)
        (run / "wandb").mkdir(parents=True, exist_ok=True)  # else wandb falls back to a temporary folder
        file = run / RUN_ID
        if self._id is None:
            known = file.read_text(encoding="utf-8").strip() if file.exists() else secrets.token_hex(4)
            self._id = os.environ.get("WANDB_RUN_ID", known)  # which the agent of a sweep sets
            self._wandb_init["id"] = self._id
        if self._offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
            self._wandb_init["mode"] = "offline"
            self._wandb_init["resume"] = None  # is for the server; `wandb sync` joins the parts by their id
            self._wandb_init["settings"] = wandb.Settings(silent=True)  # one line at the end says what to do
        file.write_text(f"{self._id}\n", encoding="utf-8")
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        shown = {name: record[name] for name in ("parameters", "environment")}
        shown["command"] = record["calls"][-1]["command"]
        self.experiment.config.update({**config, **shown}, allow_val_change=True)
        self.experiment.define_metric(TOKENS)
        for metric, better in FIGURES.items():
            self.experiment.define_metric(metric, step_metric=STEP, step_sync=True, summary=better.__name__)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The whole configuration is there already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = dict(metrics)
        if self.trainer is not None:
            step = self.trainer.global_step
            tokens = self.trainer.callback_metrics.get("train/tokens")
            if tokens is not None:
                row[TOKENS] = float(tokens)
        self.experiment.log({**row, STEP: step}, step=step)

    @rank_zero_only
    def end(self, run: Path) -> None:
        """Log what stands at the end of training, a classifier's verdicts and by option the weights, and finish."""
        import wandb

        if (verdicts := read_verdicts(run, SOURCES[:1])) is not None:
            names = verdicts.names
            truth, predicted = verdicts.truth.tolist(), verdicts.predicted.tolist()
            rows = [
                [text, names[guess], names[true], *probabilities]
                for text, guess, true, probabilities in zip(
                    verdicts.texts, predicted, truth, verdicts.probabilities.tolist(), strict=True
                )
            ]
            self.log_table("predictions", ["text", "label", "true_label", *names], rows)
            matrix = wandb.plot.confusion_matrix(y_true=truth, preds=predicted, class_names=names, title="Confusion")
            self.log_metrics({"confusion": matrix})
        if self.keeps_model:
            for kind, path in (("model", run / "checkpoints" / "best.ckpt"), ("adapter", run / "adapter")):
                if path.exists():
                    artifact = wandb.Artifact(f"{kind}-{self._id}", type=kind)
                    artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
                    self.experiment.log_artifact(artifact)
        # Of a resumed run W&B has summed up the last part alone. The row in progress would be summed up after this.
        self.experiment.log({}, commit=True)
        rows = read_metrics(run)
        for metric, better in FIGURES.items():
            if (value := best(rows, metric)) is not None:
                self.experiment.summary[metric] = {better.__name__: value}
        offline = self.experiment.offline
        self.experiment.finish()
        if offline:
            console.print(f"W&B was kept offline; send it with: wandb sync {run / 'wandb' / 'offline-run-*'}")
        self._experiment = None
