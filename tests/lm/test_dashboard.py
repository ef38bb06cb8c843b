"""What a run leaves for people: its report and record, the W&B run it keeps offline, and the comparison of decoding."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from wandb.proto.wandb_internal_pb2 import Record

from experiment.nn.hardware import default_precision
from experiment.pages.report import write_report
from lm.__main__ import main
from lm.decoding.strategies import STRATEGIES, distinct_share, output_perplexity, repeated_share
from lm.decoding.strategies import main as compare
from lm.model.config import DecoderConfig
from lm.model.decoder import Decoder
from tests.offline_wandb import config_of, history_of, metrics_of, read_offline, run_ids

pytestmark = pytest.mark.slow
WANDB = Path(__file__).parents[2] / "configs" / "wandb.yaml"
OPTIONS = {
    "data": {"vocab_size": 345, "sequence_length": 16, "batch_size": 4},
    "model.decoder": {
        "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2, "max_sequence_length": 64
    },
    "model.optimizer": {"schedule": "constant"},
    "trainer": {"accelerator": "cpu", "val_check_interval": 2, "check_val_every_n_epoch": "null",
                "log_every_n_steps": 1},
    "checkpoint": {"every_n_steps": 2},
    "samples": {"every_n_steps": 2, "max_new_tokens": 4, "prompts": "[Tom]"},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, resumed and taken to six, with W&B kept offline."""
    folder = tmp_path_factory.mktemp("dashboard")
    texts = [
        f"Once upon a time, {name} had a {thing}. {name} was {mood}. The end."
        for name in ("Tom", "Anna", "Ben")
        for thing in ("red ball", "big dog", "blue hat", "small boat")
        for mood in ("happy", "very sad", "kind")
    ]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["fit", "--config", str(WANDB), f"--data.path={folder}", f"--run_dir={folder / 'tiny'}"]
    arguments += [f"--{group}.{name}={value}" for group, values in OPTIONS.items() for name, value in values.items()]
    main([*arguments, "--trainer.max_steps=4"])
    keep_model = "--trainer.logger.init_args.log_model=true"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder / "artifacts"))
        main([*arguments, keep_model, "--trainer.max_steps=6", "--report=true", "--ckpt_path=last"])
    return folder / "tiny"


@pytest.fixture(scope="module")
def parts(run: Path) -> list[list[Record]]:
    return read_offline(run)


def test_resumed_training_continues_the_same_wandb_run_at_its_step(run: Path, parts: list[list[Record]]) -> None:
    assert run_ids(parts) == [(run / "wandb/run-id.txt").read_text().strip()] * 2
    history = history_of(parts)
    assert [row["trainer/global_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6]


def test_wandb_row_holds_training_and_validation_of_its_step_and_the_tokens(parts: list[list[Record]]) -> None:
    history = history_of(parts)
    training = {"train/loss", "train/learning_rate", "train/tokens_per_second"}
    assert training | {"val/loss", "val/perplexity"} <= set(history[1])
    assert "val/loss" not in history[0]
    tokens = [row["tokens"] for row in history]
    assert tokens == sorted(tokens) and tokens[0] > 0


def test_wandb_knows_whole_configuration_parameters_machine_and_command(run: Path, parts: list[list[Record]]) -> None:
    config = config_of(parts[0])
    first = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == first["model"] and config["data"] == first["data"]
    assert config["parameters"]["total"] == config["parameters"]["trainable"] > 1000
    assert config["environment"]["torch"] == torch.__version__
    assert config["command"].startswith("tinylab lm fit --config")


def test_wandb_summary_is_the_least_loss_and_perplexity(parts: list[list[Record]]) -> None:
    defined = metrics_of(parts)
    assert defined["val/loss"].summary.min and defined["val/perplexity"].summary.min
    assert defined["val/loss"].step_metric == "trainer/global_step" and "tokens" in defined


def test_wandb_table_of_samples_grows_over_a_resume(run: Path) -> None:
    sizes = {}
    for file in (run / "wandb").glob("offline-run-*/files/media/table/samples_*.table.json"):
        table = json.loads(file.read_text())
        assert table["columns"] == ["step", "prompt", "story"]
        sizes[table["data"][-1][0]] = len(table["data"])
    assert sizes == {2: 1, 4: 2, 6: 3}


def test_wandb_keeps_the_best_model_by_option(parts: list[list[Record]]) -> None:
    kept = [r.artifact for part in parts for r in part if r.HasField("artifact")]
    kept += [r.request.log_artifact.artifact for part in parts for r in part if r.request.HasField("log_artifact")]
    assert {artifact.type for artifact in kept} >= {"model"}


def test_run_keeps_its_commands_and_their_steps(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert [(call["from_step"], call["to_step"]) for call in record["calls"]] == [(0, 4), (4, 6)]
    assert record["calls"][1]["command"].endswith("--ckpt_path=last")
    assert record["environment"]["precision"] == default_precision("cpu")


def test_fit_writes_the_report_unless_told_not_to(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "best, at step" in page and "resumed 1 time" in page and "--ckpt_path=last" in page
    config = str(run / "config.yaml")
    main(["fit", "--config", config, f"--run_dir={run.parent / 'plain'}", "--trainer.max_steps=1",
          "--report=false", "--trainer.logger=null"])  # fmt: skip
    assert not (run.parent / "plain" / "report.html").exists()
    assert write_report([run, run.parent / "plain"]) == run.parent / "compare-tiny-plain" / "report.html"


def test_decoding_is_compared_and_the_cache_changes_no_token(run: Path, capsys: pytest.CaptureFixture) -> None:
    compare([str(run), "--max_new_tokens=24"])
    printed = capsys.readouterr().out
    assert "no token changed" in printed and "repetition, of all 4-grams" in printed
    outcomes = {one["strategy"]: one for one in json.loads((run / "decoding.json").read_text())}
    assert list(outcomes) == list(STRATEGIES)
    assert outcomes["greedy"]["token_ids"] == outcomes["greedy, no cache"]["token_ids"]
    assert outcomes["greedy"]["token_ids"] != outcomes["temperature 1"]["token_ids"]
    assert outcomes["greedy"]["repeated_4_grams_overall"] > outcomes["temperature 1"]["repeated_4_grams_overall"]
    # Greedy decoding takes the likeliest token, so its own perplexity is the lowest.
    assert outcomes["greedy"]["perplexity"] < outcomes["temperature 0.5"]["perplexity"]
    assert outcomes["temperature 0.5"]["perplexity"] < outcomes["temperature 1"]["perplexity"]
    assert (run / "figures" / "decoding.png").stat().st_size > 10_000
    assert "<td>temperature 0.5</td>" in write_report([run]).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["tiny", "--max_new_tokens=0"], "max_new_tokens=0"),
        (["tiny", "--prompts=[" + "Tom had a ball " * 30 + "]"], "the model's context of 64"),
    ],
    ids=["no-run", "no-tokens", "long-prompt"],
)
def test_bad_input_of_decoding_is_refused_in_one_line(
    arguments: list[str], words: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit) as exit_:
        compare(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert words in error and error.count("\n") == 1


def test_repetition_and_distinctness_are_counted_by_hand() -> None:
    assert repeated_share([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)  # 1234 comes twice among five
    assert repeated_share([[7] * 10]) == pytest.approx(6 / 7)
    assert repeated_share([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2]]) == 0  # other stories do not count
    assert distinct_share([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)
    assert distinct_share([[1]]) == 1


def test_perplexity_of_output_is_that_of_its_tokens_alone() -> None:
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2)
    ).eval()
    prompt, story = [1, 2, 3], [4, 5]
    with torch.no_grad():
        losses = -decoder(torch.tensor([prompt + story]))[0].log_softmax(-1)
    expected = torch.stack([losses[2, 4], losses[3, 5]]).mean().exp().item()
    assert output_perplexity(decoder, [prompt], [story]) == pytest.approx(expected, rel=1e-5)
