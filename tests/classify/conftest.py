"""A tiny random BERT with its own tokenizer, in a folder as the hub would give it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from classify.reviews import synthetic_reviews

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}


def save_tiny_bert(folder: Path, seed: int = 0, kind: str = "bert", pooler: bool = True, **sizes: int) -> Path:
    """A BERT, or a `kind` of it, of 2 layers and hidden size 32 that knows the words of the synthetic reviews."""
    texts = synthetic_reviews("validation")["text"][:300]
    splitter = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())})
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    shape = {"max_position_embeddings": 64, "pad_token_id": 0} | (DISTILBERT if kind == "distilbert" else BERT) | sizes
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=len(vocabulary), **shape)
    AutoModel.from_config(config, **({} if pooler else {"add_pooling_layer": False})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def make_bert(tmp_path: Path) -> Callable[..., Path]:
    """Makes another tiny BERT: `make_bert(seed=1, hidden_size=48)`."""
    return lambda **options: save_tiny_bert(tmp_path / "other-bert", **options)


@pytest.fixture(scope="session")
def small_run(tiny_bert: Path) -> list[str]:
    """Flags that shrink any run to seconds: the tiny model, the synthetic reviews, few of them."""
    return [
        f"--model.name={tiny_bert}",
        "--data.path=demo",
        "--data.train_size=48",
        "--data.validation_size=20",
        "--data.test_size=12",
        "--data.max_length=32",
        "--data.eval_max_length=40",
        "--data.batch_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
    ]
