"""What a run leaves: predictions in the texts' order, as names, whatever the texts hold."""

import json

import pytest

from classify.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def run(tmp_path, small_run):
    main(["fit", *small_run, "--trainer.max_steps=2", f"--run_dir={tmp_path / 'run'}"])
    return tmp_path / "run"


def predictions(run, *flags: str) -> list[dict]:
    main(["predict", f"--config={run / 'config.yaml'}", "--ckpt_path=last", *flags])
    with (run / "predictions.jsonl").open(encoding="utf-8") as lines:
        return list(map(json.loads, lines))


def test_predictions_of_the_test_reviews_come_in_their_order_with_their_true_labels(run, capsys):
    lines = predictions(run, "--data.eval_batch_size=5")
    assert len(lines) == 12
    assert lines == predictions(run, "--data.eval_batch_size=1")
    for line in lines:
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
        assert line["true_label"] in ("negative", "positive")
    assert "12 predictions written to" in capsys.readouterr().out


def test_texts_with_markup_control_characters_and_special_tokens_are_data(run, tmp_path, capsys):
    texts = ["[bold]x[/bold] \x1b[31m [SEP] [/]", "é\u2028\x00 ok", "long " * 20000, "a\nb"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    capsys.readouterr()
    assert [line["text"] for line in predictions(run, f"--data.texts={file}")] == texts
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown
    assert "[bold]x" in shown


def test_invalid_utf8_in_a_file_of_texts_is_replaced(run, tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"Good \xff\xfe film.\nBad.\n")
    assert len(predictions(run, f"--data.texts={tmp_path / 'texts.txt'}")) == 2
