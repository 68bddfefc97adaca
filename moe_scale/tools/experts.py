"""``moe-scale experts``: which experts of a trained translation model serve which languages and kinds of tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from moe_scale.config import TranslationConfig
from moe_scale.data.pairs.batches import PairBatch, eval_pair_batches
from moe_scale.data.pairs.prepare import TOKENIZER, PairSplit, PreparedPairs, prepare_pairs
from moe_scale.data.pairs.tokenizer import PairTokenizer
from moe_scale.errors import ConfigError, Problem
from moe_scale.evaluate.expert_usage import LayerUsage, watched_choices
from moe_scale.telemetry.provenance import commit_of
from moe_scale.telemetry.terminal import Console
from moe_scale.tools.arguments import not_negative, positive
from moe_scale.tools.expert_plots import plot_groups, plot_load
from moe_scale.tools.stored_run import TRANSLATION, StoredRun, open_run
from moe_scale.tools.tables import markdown

CLASSES = ("frequent", "rare", "punctuation", "digits", "tags and ends")
CHOICES = ("language", "direction", "token class")
"""Ways of sorting tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("--run", required=True, help="folder of a run of recipes/translation.py, or a checkpoint of it")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="held-out pairs [%(default)s]")
    parser.add_argument(
        "--max_sentences", type=not_negative, default=0, help="of each direction, at most; 0 means all [%(default)s]"
    )
    parser.add_argument("--batch_tokens", type=positive, default=4096, help="tokens at a time [%(default)s]")
    parser.add_argument("--output_dir", help="folder of the analysis [RUN/experts]")


def run(arguments: argparse.Namespace) -> dict[str, LayerUsage]:
    """Route held-out pairs; write ``experts.json``, ``experts.md`` and pictures, and print the table.

    Raises:
        ConfigError: when the run or its data cannot be used, or the model has no experts; nothing is written then.
    """
    stored = open_run(arguments.run, TRANSLATION)
    config = stored.config
    if not config.sparse_layers:
        raise ConfigError(Problem("run", f"{arguments.run} holds a dense model", "give one with experts"))
    pairs = prepare_pairs(config.data, config.model.vocab_size, print)
    _require_own_tokenizer(pairs, stored)
    model = stored.load_model()
    folder = Path(arguments.output_dir).expanduser() if arguments.output_dir else stored.folder / "experts"
    split = pairs.split(arguments.split)
    batches = list(
        eval_pair_batches(
            split,
            pairs.tokenizer,
            budget=max(arguments.batch_tokens, 4 * config.data.max_len),
            rank=0,
            world_size=1,
            limit_per_direction=arguments.max_sentences,
        )
    )
    usage = analyse(model, batches, pairs, config.moe.num_experts)
    facts = {
        "run": str(stored.folder),
        "step": stored.index.step,
        "split": arguments.split,
        "sentences": sum(len(batch.source_BS) for batch in batches),
        "commit": commit_of(Path(__file__).resolve().parents[1])[:9] or "unknown",
    }
    write(usage, facts, folder)
    return usage


def _require_own_tokenizer(pairs: PreparedPairs, stored: StoredRun[TranslationConfig]) -> None:
    """Raises ConfigError where the data is not that of the run any more: its tokens would mean something else."""
    if pairs.tokenizer.fingerprint != PairTokenizer.load(stored.folder / TOKENIZER).fingerprint:
        what = f"{stored.config.data.source} gives another vocabulary than {stored.folder / TOKENIZER}"
        raise ConfigError(Problem("data.source", what, "bring back the data that the run was trained on", True))


def analyse(
    model: nn.Module, batches: Sequence[PairBatch], pairs: PreparedPairs, num_experts: int
) -> dict[str, LayerUsage]:
    """Usage by layer, ``encoder.0`` and so on, of the pairs' tokens as the model reads them.

    Tokens of the encoder are in the source's language, those of the decoder in the target's.
    """
    languages = sorted({code for direction in pairs.directions for code in direction.split("-")})
    groups = {"language": languages, "direction": pairs.directions, "token class": CLASSES}
    class_V = token_classes(pairs.tokenizer, pairs.split("train"))
    sides = [[languages.index(direction.split("-")[side]) for direction in pairs.directions] for side in (0, 1)]
    usage: dict[str, LayerUsage] = {}
    with watched_choices(model) as seen, torch.no_grad():
        for batch in track(batches, description="routing", transient=True):
            model(batch.source_BS, batch.inputs_BT, batch.targets_BT)
            for name, chosen_TE, valid_T in seen:
                part, number, *_ = name.split(".")
                in_decoder = part == "decoder"
                ids = batch.inputs_BT if in_decoder else batch.source_BS
                directions = batch.directions_B.unsqueeze(1).expand_as(ids).reshape(-1)[valid_T]
                layer = usage.setdefault(f"{part}.{number}", LayerUsage(num_experts, groups))
                layer.add(
                    chosen_TE[valid_T],
                    {
                        "language": torch.tensor(sides[in_decoder])[directions],
                        "direction": directions,
                        "token class": class_V[ids.reshape(-1)[valid_T]],
                    },
                )
            seen.clear()
    return usage


def token_classes(tokenizer: PairTokenizer, train: PairSplit) -> Tensor:
    """The place in :data:`CLASSES` of each token, int64 [V].

    Of the tokens with letters the most frequent ones that make up half of their occurrences in the training pairs are
    frequent, the others rare. Blanks count as punctuation, bytes of letters that the vocabulary lacks as rare.
    """
    counts_V = torch.from_numpy(train.token_counts(tokenizer.vocab_size))
    texts = [tokenizer.piece(index) for index in range(tokenizer.vocab_size)]
    class_V = torch.full((tokenizer.vocab_size,), CLASSES.index("rare"))
    words = []
    for index, text in enumerate(texts):
        if text is None:
            class_V[index] = CLASSES.index("tags and ends")
        elif text.strip() and all(character.isdigit() for character in text.strip()):
            class_V[index] = CLASSES.index("digits")
        elif text and not any(character.isalnum() for character in text):
            class_V[index] = CLASSES.index("punctuation")
        elif text:  # no byte
            words.append(index)
    words_W = torch.tensor(words, dtype=torch.int64)
    order_W = words_W[counts_V[words_W].argsort(descending=True, stable=True)]
    before_W = counts_V[order_W].cumsum(dim=0) - counts_V[order_W]
    class_V[order_W[before_W < counts_V[order_W].sum() / 2]] = CLASSES.index("frequent")
    return class_V


def write(usage: dict[str, LayerUsage], facts: dict[str, Any], folder: Path) -> None:
    """The table, in the terminal and as ``experts.md``; all counts as ``experts.json``; pictures."""
    rows = [_row(name, layer) for name, layer in usage.items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experts.json").write_text(json.dumps({**facts, "layers": _record(usage)}, indent=1) + "\n")
        (folder / "experts.md").write_text(_markdown(rows, facts))
        plot_load(usage, folder / "load.png")
        for grouping in CHOICES:
            plot_groups(usage, grouping, folder / f"by_{grouping.replace(' ', '_')}.png")
    except OSError as error:
        raise ConfigError(Problem("--output_dir", f"{folder} cannot be written: {error.strerror}")) from None
    table = Table(*COLUMNS, title=_title(facts))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(f"counts and pictures: {folder}")


COLUMNS = (
    "layer",
    "max/mean load",
    "load CV",
    "unused",
    *(f"bits about {grouping}" for grouping in CHOICES),
)


def _row(name: str, layer: LayerUsage) -> list[str]:
    told = [layer.groupings[grouping] for grouping in CHOICES]
    bits = [f"{g.mutual_information:.3f} of {g.entropy:.2f}" for g in told]
    return [name, f"{layer.load_max:.2f}", f"{layer.load_cv:.2f}", str(layer.unused), *bits]


def _title(facts: dict[str, Any]) -> str:
    return f"{facts['sentences']:,} {facts['split']} sentences, step {facts['step']:,}"


def _markdown(rows: list[list[str]], facts: dict[str, Any]) -> str:
    return f"{_title(facts)}, commit {facts['commit']}\n\n{markdown(COLUMNS, rows)}\n"


def _record(usage: dict[str, LayerUsage]) -> dict[str, Any]:
    return {
        name: {
            "counts": layer.counts_E.long().tolist(),
            "load_max": layer.load_max,
            "load_cv": layer.load_cv,
            "unused": layer.unused,
            **{
                grouping: {
                    "groups": found.groups,
                    "counts": found.counts_GE.long().tolist(),
                    "mutual_information_bits": found.mutual_information,
                    "entropy_bits": found.entropy,
                    "chance_bits": found.chance,
                }
                for grouping, found in layer.groupings.items()
            },
        }
        for name, layer in usage.items()
    }
