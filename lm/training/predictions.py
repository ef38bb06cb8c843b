"""The output of `predict`: the stories, in a file and on the terminal."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from experiment.console import console
from experiment.errors import InputError
from lm.data.tokenizer import StoryTokenizer
from lm.decoding.compilation import CompilationError
from lm.decoding.generation import TextStream, generate
from lm.model.config import GenerationConfig
from lm.model.decoder import Decoder


def continue_prompts(
    decoder: Decoder,
    batch: dict[str, Any],
    config: GenerationConfig,
    tokenizer: StoryTokenizer,
    on_token: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """The stories of a batch of `PromptBatches`: ``prompt``, ``text``, ``tokens`` and ``finish_reason`` of each.

    Raises:
        InputError: They cannot be decoded as configured.
    """
    ids = batch["input_ids"]
    try:
        results = generate(decoder, ids, config, tokenizer.eos_id, tokenizer.decode, on_token)
    except CompilationError as error:
        raise InputError(str(error)) from error
    return [
        {
            "prompt": prompt,
            "text": tokenizer.decode(prompt_ids + result.token_ids),
            "tokens": len(result.token_ids),
            "finish_reason": result.finish_reason,
        }
        for prompt, prompt_ids, result in zip(batch["prompts"], ids, results, strict=True)
    ]


class Predictions(BasePredictionWriter):
    """Writes the stories of ``predict`` to predictions.jsonl in the run's folder, and shows them."""

    def __init__(self, stream: bool = True) -> None:
        """
        Args:
            stream: On a terminal, show the first story of each batch as it is generated, token by token.
        """
        super().__init__(write_interval="batch")
        self.stream = stream

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        context = pl_module.decoder.config.max_sequence_length
        for batch in trainer.datamodule.predict_dataloader():
            for prompt, ids in zip(batch["prompts"], batch["input_ids"], strict=True):
                if len(ids) > context and not pl_module.generation.sliding_window:
                    shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}…"
                    raise InputError(
                        f"prompt {shown!r} has {len(ids)} tokens, expected at most the model's context of "
                        f"{context}: shorten it, or set --model.generation.sliding_window true"
                    )
        self.file = Path(trainer.default_root_dir) / "predictions.jsonl"
        self._partial = self.file.with_suffix(".partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._partial.write_text("", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self.file} cannot be written ({error.strerror}): choose another --run_dir") from error

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        pl_module.on_token = None
        if self.stream and console.is_terminal:
            self._text = TextStream(pl_module.tokenizer.decode, batch["input_ids"][0])
            console.print(self._text.text, end="")
            pl_module.on_token = self._show

    def _show(self, row: int, token: int) -> None:
        if row == 0:
            console.print(self._text.add(token), end="")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with self._partial.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(story, ensure_ascii=False) + "\n" for story in prediction)
        if shown := pl_module.on_token is not None:
            console.print(self._text.rest() + _ending(prediction[0]))
        for story in prediction[shown:]:
            console.print(story["text"] + _ending(story))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._partial.replace(self.file)
        most = pl_module.generation.max_new_tokens
        cut = f"… means cut off, after {most:,} tokens (--model.generation.max_new_tokens) or at the end of the context"
        console.print(f"written to {self.file}; {cut}", style="dim")


def _ending(story: dict[str, Any]) -> str:
    return " …\n" if story["finish_reason"] == "length" else "\n"
