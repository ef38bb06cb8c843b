"""Byte-fallback BPE tokenizers: made of scored pieces, or trained.

A trained one has LLaMA's layout: <unk> 0, <s> 1, </s> 2, the 256 bytes <0x00> ... <0xFF> at 3 to 258, then the pieces
in the order in which they were found. Text is encoded whole, with a space prepended; what no piece covers falls
back to its UTF-8 bytes, so that any text round-trips.

SentencePiece and llama2.c repeatedly join the adjacent pair whose union has the highest score. A `tokenizers` BPE has
ranked pairs instead; `_merges` ranks all splits of all pieces by the piece's score, which gives the same ids. A
trained tokenizer needs one more thing: words are split by a rule that looks only at two neighboring characters
(`_WORDS`), so that no piece spans a boundary, and no merge over the whole text can either.
"""

import json
from collections.abc import Collection, Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from experiment.errors import InputError
from lm.data.tokenizer import BYTES, SPACE, StoryTokenizer

SPECIALS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2
# Letters with a space before them, other marks with a space before them, single digits, single spaces. Controls,
# newlines and other white space become bytes.
_WORDS = rf"{SPACE}?[\p{{L}}\p{{M}}]+|{SPACE}?[^\p{{L}}\p{{M}}\p{{N}}\s\p{{C}}{SPACE}]+|\p{{N}}|{SPACE}"


def from_pieces(
    pieces: Sequence[bytes | str],
    scores: Sequence[float],
    bos_id: int = 1,
    eos_id: int = 2,
    control_ids: Collection[int] = (0, 1, 2),
    name: str = "it",
    adds_bos: bool = True,
) -> StoryTokenizer:
    """The tokenizer that greedily joins the adjacent pair whose union has the highest score, as SentencePiece's BPE
    and llama2.c do.

    Args:
        pieces: the vocabulary in the order of its ids; the space is " " or U+2581, a byte is "<0x41>".
        scores: a score for each piece; ignored for control tokens and bytes.
        bos_id: the id that begins a text.
        eos_id: the id that ends it.
        control_ids: the tokens that represent no text; they must include id 0, the unknown token.
        name: what to call it in messages.
        adds_bos: whether it puts bos before every text.

    Raises:
        InputError: a piece is not UTF-8, two are equal, or one of the 256 bytes is missing.
    """
    try:
        texts = [piece if isinstance(piece, str) else piece.decode() for piece in pieces]
    except UnicodeDecodeError as error:
        raise InputError(f"tokenizer {name!r} holds a piece that is not UTF-8 ({error.object!r})") from None
    texts = [text.strip("\n") if i in control_ids else text.replace(" ", SPACE) for i, text in enumerate(texts)]
    vocab = {text: i for i, text in enumerate(texts)}
    if len(vocab) < len(texts):
        double = next(text for i, text in enumerate(texts) if vocab[text] != i)
        raise InputError(f"tokenizer {name!r} holds the piece {double!r} twice")
    if missing := [piece for piece in BYTES if piece not in vocab]:
        raise InputError(f"tokenizer {name!r} lacks {missing[0]}, so it cannot take all text; use another, or 'train'")
    outside = {*control_ids, *(vocab[piece] for piece in BYTES)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores, outside),
            unk_token=texts[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens([AddedToken(texts[i], special=True, normalized=False) for i in sorted(control_ids)])
    tokenizer = StoryTokenizer(backend, bos_id, eos_id, name=name)
    if adds_bos:
        tokenizer.begin_with_bos()
    return tokenizer


def _merges(vocab: dict[str, int], scores: Sequence[float], outside: set[int]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, best score first; ties as in transformers' converter."""
    merges = []
    for piece, i in vocab.items():
        if i in outside:
            continue
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        splits = [(vocab[a], vocab[b]) for a, b in splits if a in vocab and b in vocab]
        merges += [(-scores[i], i, left, right) for left, right in splits if not {left, right} & outside]
    pieces = list(vocab)
    return [(pieces[left], pieces[right]) for _, _, left, right in sorted(merges)]


def piece_scores(tokenizer: StoryTokenizer) -> dict[str, float]:
    """Scores that reproduce the order of the tokenizer's merges; characters and bytes, made by no merge, have none."""
    scores: dict[str, float] = {}
    for left, right in json.loads(tokenizer.backend.to_str())["model"]["merges"]:
        scores.setdefault(left + right, -float(len(scores)))
    return scores


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> StoryTokenizer:
    """A byte-fallback BPE (Sennrich et al. 2016, arXiv:1508.07909) of `vocab_size` tokens, LLaMA's layout;
    or fewer if the texts do not yield that many.

    A piece never crosses a word and never mixes letters, digits and other marks. Characters beyond the most frequent
    (at most half of the pieces) are encoded as bytes.

    Raises:
        InputError: vocab_size is too small for the bytes.
    """
    fixed = SPECIALS + BYTES
    if vocab_size <= len(fixed):
        raise InputError(f"vocab_size {vocab_size}: a tokenizer needs at least {len(fixed) + 1}; raise vocab_size")
    trainee = Tokenizer(models.BPE(unk_token="<unk>"))
    trainee.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trainee.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=fixed,
        limit_alphabet=(vocab_size - len(fixed)) // 2,
        show_progress=False,  # the caller shows the progress over the texts
    )
    trainee.train_from_iterator(texts, trainer)
    vocab = trainee.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    return from_pieces(pieces, [min(0.0, len(fixed) - i) for i in range(len(pieces))], name="train")
