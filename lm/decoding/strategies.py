"""``tinylab decoding RUN``: compares greedy decoding and sampling on one model, in numbers and stories.

Written to test the claim that greedy decoding repeats itself and sampling does not. It measures the share of repeated
4-grams, within each story (Welleck et al. 2020, arXiv:1908.04319) and over all stories together, distinct-2 (Li et
al. 2016, arXiv:1510.03055), the model's own perplexity on its output, and tokens per second. Greedy decoding runs
with and without the cache, which must not change a token.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from rich import box
from rich.table import Table

from experiment.command_parser import one_line_errors
from experiment.console import console
from experiment.errors import InputError
from experiment.invocation import command
from experiment.nn.hardware import default_device
from experiment.progress import progress
from experiment.quiet import quiet_libraries
from experiment.sources.paths import user_path
from lm.data.prompts import read_prompts
from lm.data.tokenizer import StoryTokenizer
from lm.decoding.generation import generate
from lm.formats.pretrained import load_checkpoint
from lm.model.config import GenerationConfig
from lm.model.decoder import Decoder

PROMPTS = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "One day, a boy named Tim found",
    "There was a small dog",
    "The sun was shining and",
    "Mom said",
    "In the forest lived a bear",
    "Anna had a red ball.",
    "It was a rainy day.",
    "Ben and his dad went to",
    "The cat was sad because",
    "Sam wanted to play with",
]
UNCACHED, GREEDY = "greedy, no cache", "greedy"
STRATEGIES = {
    UNCACHED: {"temperature": 0.0, "use_cache": False},
    GREEDY: {"temperature": 0.0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 0.8": {"temperature": 0.8},
    "temperature 1": {"temperature": 1.0},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-p 0.5": {"temperature": 1.0, "top_p": 0.5},
}
# Field of `Outcome`: column of the table, title of the panel, form.
FIGURES = {
    "tokens_per_second": ("tokens/s", "tokens per second", "{:,.0f}"),
    "mean_length": ("length", None, "{:.0f}"),
    "repeated_4_grams": ("rep-4", "repeated 4-grams, in a story", "{:.1%}"),
    "repeated_4_grams_overall": ("overall", "repeated 4-grams, overall", "{:.1%}"),
    "distinct_2": ("distinct-2", "distinct-2", "{:.3f}"),
    "perplexity": ("perplexity", "perplexity of the output", "{:.2f}"),
}


@dataclass
class Outcome:
    """The results of one decoding strategy on all prompts.

    Args:
        strategy: Its name in STRATEGIES.
        tokens_per_second: New tokens of all stories in one batch, per second.
        repeated_4_grams: Share of 4-grams that occurred earlier in the same story; see `repeated_share`.
        repeated_4_grams_overall: Share of 4-grams that occurred earlier in this or a previous story.
        distinct_2: See `distinct_share`.
        perplexity: exp of the mean loss of the new tokens, under the model itself at temperature 1.
        mean_length: Mean new tokens per story.
        stories: Texts, prompts included.
        token_ids: New tokens of each story.
    """

    strategy: str
    tokens_per_second: float
    repeated_4_grams: float
    repeated_4_grams_overall: float
    distinct_2: float
    perplexity: float
    mean_length: float
    stories: list[str]
    token_ids: list[list[int]]


def n_grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def repeated_share(stories: Sequence[Sequence[int]], n: int = 4) -> float:
    """The share of all n-grams that occurred earlier in the same story; 0 if there are none."""
    grams = [n_grams(story, n) for story in stories]
    total = sum(map(len, grams))
    return 1 - sum(len(set(of_one)) for of_one in grams) / total if total else 0.0


def distinct_share(stories: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams divided by all n-grams, over all stories; 1 if there are none."""
    grams = [gram for story in stories for gram in n_grams(story, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


@torch.inference_mode()
def output_perplexity(decoder: Decoder, prompts: list[list[int]], stories: list[list[int]]) -> float:
    """Perplexity of the stories' tokens, each given its prompt and the tokens before it."""
    loss, tokens = 0.0, 0
    for prompt, story in zip(prompts, stories, strict=True):
        ids = torch.tensor([prompt + story], device=decoder.embedding.weight.device)
        logits = decoder(ids[:, :-1])[0, len(prompt) - 1 :].float()
        loss += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        tokens += len(story)
    return math.exp(loss / tokens)


def measure(
    decoder: Decoder, tokenizer: StoryTokenizer, prompts: Sequence[str], max_new_tokens: int = 200, seed: int = 0
) -> list[Outcome]:
    """Decode all prompts with every strategy in STRATEGIES.

    Raises:
        InputError: A prompt does not leave room for a story in the model's context.
    """
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= decoder.config.max_sequence_length:
            raise InputError(
                f"prompt {prompt[:40]!r} has {len(ids)} tokens, expected fewer than the model's context of "
                f"{decoder.config.max_sequence_length}: shorten it"
            )
    generate(decoder, encoded, GenerationConfig(max_new_tokens=2))  # warm-up: memory and kernels
    outcomes = []
    with progress("decoding", len(STRATEGIES)) as advance:
        for name, options in STRATEGIES.items():
            config = GenerationConfig(max_new_tokens=max_new_tokens, seed=seed, **options)
            if decoder.embedding.weight.is_cuda:
                generate(decoder, encoded, config, eos_id=tokenizer.eos_id)  # captures the graphs of this strategy
            begin = time.perf_counter()
            results = generate(decoder, encoded, config, eos_id=tokenizer.eos_id)
            seconds = time.perf_counter() - begin
            new = [result.token_ids for result in results]
            written = [[token for token in ids if token != tokenizer.eos_id] for ids in new]
            count = sum(map(len, new))
            outcomes.append(
                Outcome(
                    strategy=name,
                    tokens_per_second=count / seconds,
                    repeated_4_grams=repeated_share(written),
                    repeated_4_grams_overall=1 - distinct_share(written, 4),
                    distinct_2=distinct_share(written),
                    perplexity=output_perplexity(decoder, encoded, new),
                    mean_length=count / len(new),
                    stories=[tokenizer.decode(ids + story) for ids, story in zip(encoded, new, strict=True)],
                    token_ids=new,
                )
            )
            advance(1)
    return outcomes


def show(outcomes: Sequence[Outcome]) -> None:
    """Print the results, what they say about greedy decoding and the cache, and one story of each."""
    table = Table(
        title="Decoding compared",
        title_justify="left",
        caption="rep-4: share of 4-grams that occurred earlier in the same story; overall: in it or an earlier story",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # to fit into 80 columns
    )
    table.add_column("decoding", no_wrap=True)
    for column, _, _ in FIGURES.values():
        table.add_column(column, justify="right", no_wrap=True)
    for one in outcomes:
        table.add_row(one.strategy, *(form.format(getattr(one, name)) for name, (_, _, form) in FIGURES.items()))
    console.print(table)
    by_name = {one.strategy: one for one in outcomes}
    greedy, uncached, sampled = by_name[GREEDY], by_name[UNCACHED], by_name["temperature 1"]
    changed = sum(a != b for a, b in zip(greedy.token_ids, uncached.token_ids, strict=True))
    faster = greedy.tokens_per_second / uncached.tokens_per_second
    across = greedy.repeated_4_grams_overall > sampled.repeated_4_grams_overall
    within = greedy.repeated_4_grams > sampled.repeated_4_grams
    console.print(
        f"the cache: {faster:.1f} times the speed, and "
        + ("no token changed" if not changed else f"{changed} of {len(greedy.token_ids)} stories changed")
        + "\nrepetition, of all 4-grams: "
        f"{greedy.repeated_4_grams_overall:.1%} by greedy decoding ({greedy.repeated_4_grams:.1%} within a story), "
        f"{sampled.repeated_4_grams_overall:.1%} ({sampled.repeated_4_grams:.1%}) by sampling at temperature 1\n"
        f"greedy decoding repeats {'more' if across else 'no more'} from story to story, and "
        f"{'more' if within else 'no more'} within one\n"
    )
    for one in outcomes:
        if one.strategy != UNCACHED:
            console.print(one.strategy, style="dim")
            console.print(f"  {one.stories[0]}\n")


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """A bar chart of each strategy's results."""
    from matplotlib.figure import Figure

    names = [one.strategy for one in outcomes]
    panels = {title: (name, form) for name, (_, title, form) in FIGURES.items() if title}
    figure = Figure(figsize=(13, 0.5 + 0.38 * len(names)), layout="constrained")
    for axes, (title, (name, form)) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        values = [getattr(one, name) for one in outcomes]
        bars = axes.barh(names, values, color=["#2f7fe0" if "greedy" in name else "#e0700c" for name in names])
        axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, max(max(values), 1e-6) * 1.28)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    figure.axes[0].invert_yaxis()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=200)


def compare(
    run: str,
    prompts: list[str] | str | None = None,
    max_new_tokens: int = 200,
    seed: int = 0,
    tokenizer: str | None = None,
) -> None:
    """Decode the same prompts greedily and with sampling, and compare.

    Writes decoding.json and figures/decoding.png to the run's folder.

    Args:
        run: The folder of a run, such as runs/demo/lm (its best checkpoint is used), or a checkpoint in it.
        prompts: Beginnings of stories, or a file with one per line; by default a dozen.
        max_new_tokens: Longest continuation, in tokens.
        seed: Seed of sampling, so that stories can be repeated.
        tokenizer: The model's tokenizer; by default the one of the run.
    """
    from experiment.runs.reading import find_checkpoint  # imports Lightning, which --help does not need

    checkpoint = find_checkpoint(user_path(run))
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    decoder, story_tokenizer = load_checkpoint(checkpoint, tokenizer)
    decoder.to(default_device())
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    outcomes = measure(decoder, story_tokenizer, read_prompts(prompts or PROMPTS), max_new_tokens, seed)
    show(outcomes)
    draw(outcomes, folder / "figures" / "decoding.png")
    records = [asdict(outcome) for outcome in outcomes]
    (folder / "decoding.json").write_text(json.dumps(records, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written: {folder / 'figures' / 'decoding.png'}, {folder / 'decoding.json'}", style="dim")
    if (folder / "metrics.csv").is_file():
        console.print(f"next: {command('report')} {folder}  (shows it among the rest)")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    quiet_libraries(debug=False)
    with one_line_errors():
        auto_cli(
            compare, list(sys.argv[1:] if args is None else args), prog=command("decoding"),
            exit_on_error=False, allow_abbrev=False,
        )  # fmt: skip
