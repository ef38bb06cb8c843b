"""Output of a run: its predictions, and the best adapter in PEFT's format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table

from classify.pretrained import PACKAGE, resolve
from experiment.console import console
from experiment.pages.summary import read_metrics
from experiment.runs.checkpoints import BestCheckpoint
from experiment.runs.reading import read_checkpoint
from experiment.sources.paths import write_text

CARD = Path(__file__).with_name("model_card.md")


class _Verdicts:
    """Collects predictions batch by batch, and writes them as lines in the order of the texts."""

    def __init__(self) -> None:
        self._batches: list[list[torch.Tensor]] = []

    def add(self, outputs: dict[str, torch.Tensor]) -> None:
        """Keep the results of the module's `predict_step` on their device, without waiting for a GPU."""
        self._batches.append([outputs[name] for name in ("index", "labels", "probabilities")])

    def gather(self, trainer: Trainer) -> None:
        """Gather the predictions of all processes. Call it in all of them."""
        columns = (torch.cat(column).tolist() for column in zip(*self._batches, strict=True))
        # Position (-1: padding among processes), label (-1: unknown), probabilities.
        self._rows: list[tuple[int, int, list[float]]] = [row for row in zip(*columns, strict=True) if row[0] >= 0]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, self._rows)
            self._rows = [row for part in gathered for row in part]

    def write(self, file: Path, texts: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Write a line for each review, with label and probabilities by name; returns the lines."""
        lines = []
        for index, label, probabilities in sorted(self._rows):
            best = max(range(len(names)), key=probabilities.__getitem__)
            line = {"text": texts[index], "label": names[best]}
            line["probabilities"] = {name: round(p, 6) for name, p in zip(names, probabilities, strict=True)}
            if label >= 0:
                line["true_label"] = names[label]
            lines.append(line)
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return lines


class PredictionWriter(BasePredictionWriter):
    """Writes predictions.jsonl to the run's folder, one line per text, in order."""

    def __init__(self, show: int = 10) -> None:
        """
        Args:
            show: Number of predictions to print.
        """
        super().__init__(write_interval="batch")
        self.show = show

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._verdicts = _Verdicts()

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: dict[str, torch.Tensor],
        batch_indices: Sequence[int] | None, batch: Any, batch_idx: int, dataloader_idx: int,
    ) -> None:  # fmt: skip
        self._verdicts.add(prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._verdicts.gather(trainer)
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "predictions.jsonl"
            texts = trainer.datamodule.predict_reviews.texts
            self._print(self._verdicts.write(file, texts, pl_module.hparams.label_names), file)

    def _print(self, lines: list[dict[str, Any]], file: Path) -> None:
        table = Table("label", "probability", "text")
        for line in lines[: self.show]:
            text = " ".join(line["text"].split())
            shown = text if len(text) <= 70 else text[:69] + "…"
            shown = "".join(c for c in shown if c.isprintable())  # a text's control characters have no effect
            table.add_row(line["label"], f"{line['probabilities'][line['label']]:.3f}", shown)
        if self.show:
            console.print(table)
        console.print(f"{len(lines):,} prediction{'' if len(lines) == 1 else 's'} written to {file}")


class Evaluation(Callback):
    """Writes the predictions of the best validation so far to evaluation.jsonl, for the report and for W&B.

    It reuses the probabilities that validation computes anyway, so the file needs no further evaluation,
    and exists, like best.ckpt, whenever a run is killed.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._verdicts = _Verdicts()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, torch.Tensor], batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._verdicts.add(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or trainer.fast_dev_run:
            return
        # Lightning calls checkpoints last, so BestCheckpoint decides the same and saves right after.
        best = next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint))
        if best.is_better(trainer):
            self._verdicts.gather(trainer)
            if trainer.is_global_zero:
                file = Path(trainer.default_root_dir) / "evaluation.jsonl"
                texts = trainer.datamodule.reviews("validation").texts
                self._verdicts.write(file, texts, pl_module.hparams.label_names)


class AdapterExport(Callback):
    """At the end of training, writes the adapter of the best validation to adapter/, in PEFT's format."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wanted = pl_module.hparams.adapter in ("custom", "peft") and not trainer.fast_dev_run
        if not wanted or not trainer.is_global_zero:
            return
        root = Path(trainer.default_root_dir)
        best = root / "checkpoints" / "best.ckpt"
        step, end = trainer.global_step, {name: value.clone() for name, value in pl_module.state_dict().items()}
        if best.exists():
            checkpoint = read_checkpoint(best)
            step = checkpoint["global_step"]
            pl_module.load_state_dict(checkpoint["state_dict"], strict=False)
        try:
            pl_module.save_adapter(str(root / "adapter"))
        finally:
            pl_module.load_state_dict(end, strict=False)
        write_text(root / "adapter" / "README.md", model_card(trainer, pl_module, step))


def model_card(trainer: Trainer, module: LightningModule, step: int) -> str:
    """The README.md of an exported adapter: what it is, how it was trained, its scores, how to use it.

    Args:
        trainer: At the end of training; its run's metrics.csv holds the scores.
        module: The trained module.
        step: Optimizer steps after which the exported weights were taken.
    """
    from jinja2 import Environment, StrictUndefined

    h, data, run = module.hparams, trainer.datamodule, Path(trainer.default_root_dir)
    trainable, total = module.parameter_counts()
    imports, base, code = _base_in_python(h.name)
    rows = read_metrics(run) if (run / "metrics.csv").exists() else []
    row = next((row for row in rows if row["step"] == step), {})
    markdown = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    markdown.filters |= {"thousands": "{:,}".format, "tojson": json.dumps}
    return markdown.from_string(CARD.read_text(encoding="utf-8")).render(
        h=h,
        data=data,
        base=base,
        code=code,
        imports=imports,
        tokenizer="base" if data.tokenizer_name in (None, h.name) else _base_in_python(data.tokenizer_name)[2],
        variant="DoRA" if h.use_dora else "rsLoRA" if h.use_rslora else "LoRA",
        by="PEFT" if h.adapter == "peft" else "a hand-written LoRALinear",
        trainable=trainable,
        total=total,
        steps=trainer.global_step,
        step=step,
        validated=f" ({data.sizes['validation']:,} texts)" if data.sizes["validation"] else "",
        scores={name: value for name, value in row.items() if name.startswith("val/")},
    )


def _base_in_python(name: str) -> tuple[str, str, str]:
    """For a pretrained model: the Python imports it needs, its display name, and an expression for its location."""
    if name.startswith(PACKAGE):
        package, _, folder = name.removeprefix(PACKAGE).partition("/")
        place = "".join(f" / {json.dumps(part)}" for part in folder.split("/") if part)
        return "from importlib.resources import files\n\n", package, f"str(files({json.dumps(package)}){place})"
    path = Path(resolve(name))
    place = str(path.resolve()) if path.is_dir() else name
    return "", place, json.dumps(place)
