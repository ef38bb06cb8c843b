"""Whatever a command is given, it ends well or with one line and exit code 2, never with a traceback.

``TINYLAB_FUZZ=2000 pytest tests/test_fuzz_commands.py`` tries 2,000 commands, other ones each time.
"""

# ruff: noqa: E501, RUF001, RUF024 (tables of values that are never changed)
import contextlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from classify.__main__ import main as classify
from lm.__main__ import main as lm
from tests.classify.conftest import save_tiny_bert
from tests.runs import TINY, write_stories

CASES = int(os.environ.get("TINYLAB_FUZZ", "0"))
MAINS = {"lm": lm, "classify": classify}

NUMBERS = ["0", "-1", "1", "2", "3", "7", "0.5", "-0.0", "1.5", "1e-9", "1e30", "1e400", "nan", "inf", "-inf", "null",
           "true", "x", "", "[]", "[1]", "{}", "{a: 1}", "1_0", "0x10", "١", "2 3", "-", "9" * 30]  # fmt: skip
# Of what is built, sent or waited for in that size or number: nothing large.
SMALL = ["0", "-1", "-2", "1", "2", "1.5", "nan", "-inf", "null", "true", "x", "", "[]", "{a: 1}"]
BOOLS = ["true", "false", "null", "1", "0", "2", "x", "", "[]", "yes"]
WORDS = ["", "x", "null", "true", "1", "[]", "[a]", "{}", "{a: [}", "é", "🙂", "\u2028", "\ud83d", "a\tb", "%s", "{x}", "[b]",
         "auto", "val/loss", "train/loss", "min", "max", "none", "cpu", "gpu", "simple", "cosine", "wsd", "constant", "full",
         "head", "tail", "both", "custom", "peft", "norm", "value", "16-true", "bf16-mixed", "64-true"]  # fmt: skip
PATHS = ["", ".", "..", "~", "~nobody", "~ a classic", "nowhere", "no/where", "no/where/at/all", "./nowhere.jsonl", "x" * 300,
         "stories", "stories/train.jsonl", "empty", "empty.txt", "bytes.bin", "bytes.jsonl", "od[d] näme/tëxt.txt", "demo",
         "lm-run", "lm-run/checkpoints/last.ckpt", "classify-run/checkpoints/last.ckpt", "bert", "last", "best", "train",
         "/dev/null", "lone.json", "dup.yaml", "list.yaml", "config.yaml", "\ud83d", "a\x00b", "null", "[]", "é"]  # fmt: skip
TEXTS = ['["Tom"]', "[]", '[""]', '[" "]', "[1]", "[null]", "null", "I loved it. " * 60, '["' + "word " * 80 + '"]', "~ a classic",
         '["\\ud83d"]', '["[bold]x[/y]"]', '["\u2028"]', "🙂", *PATHS]  # fmt: skip
CLASSES = ["x", "EarlyStopping", "TensorBoardLogger", "CSVLogger", "lightning.pytorch.callbacks.Timer", "builtins.print",
           "os.system", "simple", "null", "true", "[]", "{class_path: x}", "CometLogger", "RichProgressBar",
           "LearningRateMonitor", "experiment.pages.wandb_logger.WandbLogger"]  # fmt: skip

TRAINER = {
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "num_nodes", "devices"), ["0", "-1", "-2", "1", "x", "null", "1.5", "[]"]),
    "max_steps": ["0", "-2", "1", "2", "x", "null", "nan", "1.5", "[]"],
    **dict.fromkeys(
        ("val_check_interval", "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "limit_test_batches",
         "limit_predict_batches", "overfit_batches", "log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val",
         "num_sanity_val_steps", "reload_dataloaders_every_n_epochs", "fast_dev_run"), NUMBERS),
    **dict.fromkeys(
        ("deterministic", "benchmark", "detect_anomaly", "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
         "barebones", "inference_mode", "use_distributed_sampler"), BOOLS),
    **dict.fromkeys(("precision", "accelerator", "strategy", "gradient_clip_algorithm", "max_time", "default_root_dir"), WORDS),
    **dict.fromkeys(("logger", "callbacks", "profiler", "plugins"), CLASSES),
}  # fmt: skip
SHARED = {
    **{f"trainer.{name}": values for name, values in TRAINER.items()},
    **dict.fromkeys(("seed_everything", "checkpoint.every_n_steps", "checkpoint.keep"), NUMBERS),
    **dict.fromkeys(("best.monitor", "best.mode"), WORDS),
    **dict.fromkeys(("report", "debugg", "trainer.max_step"), BOOLS),
    "run_dir": [path for path in PATHS if path not in (".", "..", "~")],
    **dict.fromkeys(("ckpt_path", "config", "data.path", "data.tokenizer"), PATHS),
    "data.batch_size": SMALL,
    "data.eval_batch_size": SMALL,
}
OWN = {
    "lm": {
        **dict.fromkeys(
            ("data.vocab_size", "data.sequence_length", "model.decoder.hidden_size", "model.decoder.num_layers",
             "model.decoder.num_heads", "model.decoder.num_kv_heads", "model.decoder.intermediate_size",
             "model.decoder.max_sequence_length", "samples.every_n_steps", "samples.max_new_tokens",
             "model.generation.max_new_tokens", "model.generation.top_k"), SMALL),
        **dict.fromkeys(
            ("model.decoder.dropout", "model.decoder.rope_theta", "model.optimizer.learning_rate", "model.optimizer.beta1",
             "model.optimizer.muon_learning_rate", "model.optimizer.weight_decay", "model.optimizer.eps",
             "model.optimizer.warmup_steps", "model.optimizer.final_ratio", "model.generation.temperature",
             "model.generation.top_p", "model.generation.seed", "samples.temperature"), NUMBERS),
        **dict.fromkeys(("data.packing", "data.streaming", "data.extra_first_windows", "model.decoder.query_key_norm"), BOOLS),
        **dict.fromkeys(("model.optimizer.schedule", "data.evaluation", "model.generation.weight_dtype", "model", "data"), WORDS),
        **dict.fromkeys(("data.prompts", "samples.prompts"), TEXTS),
    },
    "classify": {
        **dict.fromkeys(
            ("data.train_size", "data.validation_size", "data.test_size", "data.max_length", "data.eval_max_length",
             "model.r", "predictions.show"), SMALL),
        **dict.fromkeys(
            ("model.lora_alpha", "model.lora_dropout", "model.learning_rate", "model.weight_decay", "model.warmup",
             "model.hidden_dropout", "model.attention_dropout", "data.seed", "data.order_seed"), NUMBERS),
        **dict.fromkeys(("model.use_dora", "model.use_rslora", "model.init_lora_weights", "model.dropout_active"), BOOLS),
        **dict.fromkeys(
            ("model.adapter", "model.target_modules", "model.modules_to_save", "data.padding", "data.truncation",
             "data.label_names", "model", "data"), WORDS),
        **dict.fromkeys(("model.name", "model.adapter_weights"), PATHS),
        "data.texts": TEXTS,
    },
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A package, and a command of it with one to four odd options after those that make it quick."""
    package = draw(st.sampled_from(sorted(MAINS)))
    options = SHARED | OWN[package]
    command = draw(st.sampled_from(["fit", "fit", "fit", "validate", "predict"]))
    names = draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=4))
    odd = [f"--{name}={draw(st.sampled_from(options[name]))}" for name in names]
    if command == "fit":
        resumed = draw(st.sampled_from([[], [], ["--run_dir=lm-run", "--ckpt_path=last", "--trainer.max_steps=3"]]))
        start = [*(LM if package == "lm" else CLASSIFY), "--trainer.max_steps=1", *(resumed if package == "lm" else [])]
    else:
        texts = [] if command == "validate" else ["--data.prompts=[Tom]" if package == "lm" else "--data.texts=[Good.]"]
        start = [f"--config={package}-run/config.yaml", "--ckpt_path=last", *texts]
    return package, [command, *start, *odd]


LM = ["--data.path=stories", *TINY, "--samples.every_n_steps=0"]
CLASSIFY = [
    "--model.name=bert", "--data.path=demo", "--data.train_size=16", "--data.validation_size=6", "--data.test_size=4",
    "--data.max_length=16", "--data.batch_size=4", "--trainer.accelerator=cpu", "--report=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts good and odd, a tiny BERT, and a run of each package."""
    folder = tmp_path_factory.mktemp("world")
    write_stories(folder / "stories")
    save_tiny_bert(folder / "bert")
    (folder / "empty").mkdir()
    (folder / "od[d] näme").mkdir()
    (folder / "od[d] näme" / "tëxt.txt").write_text("Tom\u2028ran.\n\nZoë 🙂\n", encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "bytes.bin").write_bytes(bytes(range(256)))
    (folder / "bytes.jsonl").write_bytes(bytes(range(256)))
    (folder / "lone.json").write_text('["Tom \\ud83d ran"]')
    (folder / "dup.yaml").write_text("data:\n  batch_size: 2\ndata:\n  batch_size: 3\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "config.yaml").write_text("seed_everything: 1\n")
    with contextlib.chdir(folder):
        lm(["fit", *LM, "--trainer.max_steps=2", "--run_dir=lm-run"])
        classify(["fit", *CLASSIFY, "--trainer.max_steps=1", "--run_dir=classify-run"])
    return folder


@contextlib.contextmanager
def terminal(encoding: str) -> Iterator[Sequence[io.BytesIO]]:
    """Standard output and error of that encoding, as a shell of another locale gives them."""
    before, buffers = (sys.stdout, sys.stderr), (io.BytesIO(), io.BytesIO())
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(buffer, encoding, errors, write_through=True)
        for buffer, errors in zip(buffers, ("strict", "backslashreplace"), strict=True)
    )
    try:
        yield buffers
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.detach()  # else they close the buffers
        sys.stdout, sys.stderr = before


def check(package: str, args: list[str], encoding: str, world: Path, folder: Path) -> None:
    shutil.copytree(world, folder, symlinks=True)
    environment = dict(os.environ)
    code, failure = 0, None
    with contextlib.chdir(folder), warnings.catch_warnings(), terminal(encoding) as (_, errors):
        warnings.simplefilter("ignore")  # which are shown to a user, and errors in tests
        try:
            MAINS[package](args)
        except SystemExit as exit_:
            code = exit_.code or 0
        except BaseException as error:
            failure = error
    os.environ.clear()
    os.environ.update(environment)
    shutil.rmtree(folder, ignore_errors=True)
    said = errors.getvalue().decode(encoding, "replace")
    command = f"python -m {package} {' '.join(json.dumps(arg) for arg in args)}  [{encoding}]"
    if failure is not None:
        raise AssertionError(f"{command}\nends in {type(failure).__name__}: {str(failure)[:300]}") from failure
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code in (0, 2) and "Traceback" not in said, f"{command}\nexit code {code}: {said[-1000:]}"
    assert len(lines) == (code == 2), f"{command}\n{said[-1000:]}"


@pytest.mark.slow
@given(command_lines(), st.sampled_from(["utf-8", "utf-8", "ascii", "latin-1", "cp1252"]))
@settings(
    max_examples=CASES or 40, derandomize=not CASES, deadline=None, database=None, print_blob=False,
    report_multiple_bugs=False, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
)  # fmt: skip
def test_any_command_ends_well_or_with_one_line(
    world: Path, tmp_path_factory: pytest.TempPathFactory, command: tuple[str, list[str]], encoding: str
) -> None:
    check(*command, encoding, world, tmp_path_factory.getbasetemp() / "case")
