"""Export and import of weights: `tinylab convert hugging_face | llama2c | gguf | adapter | import`.

The first four export a checkpoint of `tinylab lm fit` for other programs; `import` turns such files into
a run folder, for validate, predict and further training.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import auto_cli

from experiment.command_parser import one_line_errors
from experiment.console import console
from experiment.errors import InputError
from experiment.invocation import command
from experiment.quiet import quiet_libraries
from experiment.sources.paths import user_path
from lm.data.tokenizer import StoryTokenizer
from lm.formats.adapters import adapted, merged, read_decoder_adapter, save_adapter
from lm.formats.gguf import GGUFType, to_gguf
from lm.formats.hugging_face import refuse_existing, to_hugging_face
from lm.formats.llama2c import llama2c_tokenizer_path, to_llama2c
from lm.formats.pretrained import BASE, load_adapted, load_checkpoint, load_pretrained
from lm.model.decoder import Decoder


def hugging_face(checkpoint: str, folder: str, tokenizer: str | None = None) -> None:
    """Export a checkpoint to a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

    Args:
        checkpoint: The folder of a run, such as runs/demo/lm (its best checkpoint is used), or a checkpoint in it.
        folder: Where to write; must be new or empty.
        tokenizer: The model's tokenizer; by default the one that the run's config.yaml names.
    """
    with console.status("converting"):
        to_hugging_face(*load_checkpoint(checkpoint, tokenizer), folder)
    print(f"written to {folder}: config.json, model.safetensors, tokenizer.json")


def llama2c(checkpoint: str, file: str, tokenizer: str | None = None) -> None:
    """Export a checkpoint to a .bin that llama2.c runs, and the tokenizer's .bin next to it.

    Args:
        checkpoint: The folder of a run, such as runs/demo/lm (its best checkpoint is used), or a checkpoint in it.
        file: Where to write the weights, such as model.bin; the tokenizer becomes model.tokenizer.bin. Both are new.
        tokenizer: The model's tokenizer; by default the one that the run's config.yaml names.
    """
    with console.status("converting"):
        to_llama2c(*load_checkpoint(checkpoint, tokenizer), file)
    print(f"written; try: ./run {file} -z {llama2c_tokenizer_path(file)} -i 'Once upon a time'")


def gguf(checkpoint: str, file: str, type: GGUFType = "f32", tokenizer: str | None = None) -> None:
    """Export a checkpoint, with its tokenizer, to a GGUF file that llama.cpp and Ollama run.

    Args:
        checkpoint: The folder of a run, such as runs/demo/lm (its best checkpoint is used), or a checkpoint in it.
        file: Where to write, such as model.gguf; must be new.
        type: Type of the weights: f32, f16, or q8_0 (8 bits).
        tokenizer: The model's tokenizer; by default the one that the run's config.yaml names.
    """
    with console.status("converting"):
        to_gguf(*load_checkpoint(checkpoint, tokenizer), file, type)
    print(f"written; try: llama-cli -m {file} -no-cnv --temp 0 -p 'Once upon a time'")


def adapter(checkpoint: str, folder: str) -> None:
    """Export the adapter of a run with model.adapter lora or peft, for peft's PeftModel.from_pretrained.

    Args:
        checkpoint: The folder of a run, such as runs/demo/lm (its best checkpoint is used), or a checkpoint in it.
        folder: Where to write; the base model goes into FOLDER/base, for transformers.
    """
    from experiment.runs.reading import find_checkpoint  # imports Lightning, which --help does not need

    target = Path(folder)
    refuse_existing(target)
    with console.status("converting"):
        file = find_checkpoint(user_path(checkpoint))
        decoder, lora = load_adapted(file)
        if lora is None:
            raise InputError(f"{file} holds no adapter: it was trained with model.adapter full; export the whole model")
        base, tokenizer = load_checkpoint(file.resolve().with_name(BASE))
        to_hugging_face(base, tokenizer, target / "base")
        save_adapter(decoder, lora, target, str((target / "base").resolve()))
    print(f"written to {folder}: adapter_config.json, adapter_model.safetensors, base")


def merged_with(decoder: Decoder, folder: str) -> Decoder:
    """The decoder with an adapter merged into it.

    Raises:
        InputError: The adapter cannot be read, or belongs to another model.
    """
    try:
        lora, trained = read_decoder_adapter(decoder, folder)
        return merged(adapted(decoder.config, decoder.state_dict(), lora, trained), lora)
    except ValueError as error:
        raise InputError(f"adapter {folder}: {error}") from error


def import_weights(
    source: str,
    run_dir: str,
    tokenizer: str | None = None,
    path: str = "roneneldan/TinyStories",
    adapter: str | None = None,
) -> None:
    """Make a run folder from a Hugging Face Llama or Qwen3, a llama2.c .bin, or a GGUF.

    Args:
        source: A local folder with config.json, safetensors and a tokenizer, or a hub name; a llama2.c .bin; a
            .gguf; or another run, whose adapter is merged.
        run_dir: The run folder to create.
        tokenizer: Tokenizer of a llama2.c .bin; by default model.tokenizer.bin or tokenizer.bin next to model.bin.
        path: The stories that config.yaml names for validation and further training.
        adapter: Folder of a LoRA adapter, PEFT's or ours, to merge into the weights.
    """
    from experiment.runs.run import holds_run

    run = Path(run_dir)
    if holds_run(run):
        raise InputError(f"run_dir {run} already holds a run: name another folder")
    with console.status("converting"):
        decoder, story_tokenizer, _ = load_pretrained(source, tokenizer)
        if adapter is not None:
            decoder = merged_with(decoder, adapter)
        write_run(decoder, story_tokenizer, run, path)
    print(f"written to {run}; next: {command('tell')} {shlex.quote(str(run))}")


def write_run(decoder: Decoder, tokenizer: StoryTokenizer, run: Path, path: str) -> None:
    """Write config.yaml, checkpoints/last.ckpt and best.ckpt (at step 0) and tokenizer/ as if `fit` had made them."""
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch import Trainer

    from experiment.runs.run import CONFIG
    from lm.training.module import LanguageModel

    module = LanguageModel(decoder.config)
    module.decoder.load_state_dict(decoder.state_dict())
    tokenizer.save(run / "tokenizer")
    # Without ModelCheckpoint, whose state would be missing when the checkpoint is read.
    trainer = Trainer(
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=LightningEnvironment(),  # one process, also within a SLURM job
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=False)
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")  # it is the only one
    shape = dict(module.hparams["decoder"])
    del shape["vocab_size"]  # the tokenizer's
    config = {
        "trainer": {
            "max_steps": 1000,
            "max_epochs": -1,
            "val_check_interval": 500,
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 1.0,
        },
        "data": {
            "path": path,
            "tokenizer": str((run / "tokenizer").resolve()),
            "sequence_length": decoder.config.max_sequence_length,
            "packing": True,
        },
        "model": {"decoder": shape},
    }
    # Last: it marks the folder as complete.
    (run / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    quiet_libraries(debug=False)
    exports = (hugging_face, llama2c, gguf, adapter)
    commands = {export.__name__: export for export in exports} | {"import": import_weights}
    with one_line_errors():
        auto_cli(
            commands, list(sys.argv[1:] if args is None else args), prog=command("convert"),
            exit_on_error=False, allow_abbrev=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
