"""Callbacks: validation before the first step, and sample stories."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.padding import Padding
from rich.text import Text
from torch.distributed.fsdp import FSDPModule

from experiment.compat.lightning import validate_within_fit
from experiment.console import console
from experiment.errors import InputError
from experiment.runs.loggers import RunLogger
from experiment.sources.paths import repaired, write_text
from lm.model.config import GenerationConfig

if TYPE_CHECKING:
    from lm.data.tokenizer import StoryTokenizer

PROMPTS = ("Once upon a time", "One day, a little girl named", "Tom had a red ball.")


class FirstValidation(Callback):
    """Validates pretrained weights before the first step, to show what training gains."""

    def __init__(self) -> None:
        self.wanted = False  # set by the command line

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.wanted or trainer.global_step or trainer.fast_dev_run or not trainer.enable_validation:
            return
        validate_within_fit(trainer)
        pl_module.train()


class Samples(Callback):
    """Writes stories from fixed prompts during training to the terminal, samples.jsonl and the loggers."""

    def __init__(
        self,
        every_n_steps: int = 500,
        prompts: Sequence[str] = PROMPTS,
        max_new_tokens: int = 80,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        """
        Args:
            every_n_steps: Optimizer steps between two rounds of samples; 0 writes none.
            prompts: The beginnings of the stories.
            max_new_tokens: Longest continuation, in tokens.
            temperature: Sampling temperature; 0 decodes greedily.
            seed: Sampling seed, the same in each round; training's random numbers are not affected.
        """
        if every_n_steps < 0:
            raise InputError(f"samples.every_n_steps {every_n_steps}: expected 0 (none) or more")
        self.every_n_steps = every_n_steps
        self.prompts = [repaired(prompt) for prompt in prompts]
        self.config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def check(self, tokenizer: "StoryTokenizer", context: int) -> None:
        """Raise an InputError if a prompt has more tokens than the model's context."""
        for prompt in self.prompts if self.every_n_steps else ():
            if (length := len(tokenizer.encode_prompt(prompt))) > context:
                raise InputError(
                    f"samples.prompts {prompt[:40]!r} has {length} tokens, expected at most the model's context of "
                    f"{context}: shorten it"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rewind(Path(trainer.default_root_dir) / "samples.jsonl", trainer.global_step)
        self._last_step = trainer.global_step

    @rank_zero_only
    def _rewind(self, file: Path, step: int) -> None:
        """Drop samples that a killed run wrote after the checkpoint that this run resumes from."""
        if file.exists():
            text = file.read_text(errors="replace", encoding="utf-8")
            lines = [line for line in text.split("\n") if _step_of(line) <= step]
            write_text(file, "".join(f"{line}\n" for line in lines))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._last_step:
            self._last_step = step
            with pl_module.stopwatch:
                if trainer.is_global_zero or isinstance(pl_module.decoder, FSDPModule):  # all processes hold a part
                    self.write(self.generate(trainer, pl_module), trainer)

    def generate(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Continue the prompts with the model as it is."""
        from lm.training.predictions import continue_prompts

        tokenizer = pl_module.tokenizer
        batch = {"prompts": self.prompts, "input_ids": [tokenizer.encode_prompt(prompt) for prompt in self.prompts]}
        divided = isinstance(pl_module.decoder, FSDPModule)
        with trainer.precision_plugin.forward_context() if divided else nullcontext():  # weights come in its dtype
            stories = continue_prompts(pl_module.plain_decoder, batch, self.config, tokenizer)
        return [story["text"] for story in stories]

    @rank_zero_only
    def write(self, stories: Sequence[str], trainer: Trainer) -> None:
        """Print one round of samples, and append it to samples.jsonl."""
        step = trainer.global_step
        console.print(f"samples at step {step:,}", style="dim")
        samples = Path(trainer.default_root_dir) / "samples.jsonl"
        with samples.open("a", encoding="utf-8") as file:
            for prompt, story in zip(self.prompts, stories, strict=True):
                text = Text.assemble((story[: len(prompt)], "bold"), story[len(prompt) :])
                console.print(Padding(text, (0, 0, 1, 2)), soft_wrap=False)
                record = {"step": step, "prompt": prompt, "story": story}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                # All rounds so far: the table keeps growing after a resume.
                rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n") if line]
                columns = ["step", "prompt", "story"]
                logger.log_table("samples", columns, [[row[name] for name in columns] for row in rows])


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut short by a kill
        return float("inf")
