"""``moe-scale translate``: translate sentences with a trained run of ``recipes/translation.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_scale.config import TranslationConfig
from moe_scale.data.pairs.batches import PairItem, make_batch
from moe_scale.data.pairs.prepare import TOKENIZER
from moe_scale.data.pairs.sentences import clean
from moe_scale.data.pairs.tokenizer import MAX_PIECE_LENGTH, PairTokenizer
from moe_scale.errors import ConfigError, Problem, raise_if
from moe_scale.evaluate.translation import Search, translate
from moe_scale.tools.arguments import not_negative_number, positive
from moe_scale.tools.stored_run import TRANSLATION, StoredRun, open_run
from moe_scale.tools.text_files import is_unicode, new_file, opened, read_lines, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("text", nargs="*", help="sentences, each an argument; without any, lines of --input")
    parser.add_argument("--run", required=True, help="folder of a run, which means its newest checkpoint, or of one")
    parser.add_argument("--to", required=True, metavar="LANGUAGE", help="language to translate into, as de")
    parser.add_argument("--input", metavar="FILE", help="text file, a sentence a line [standard input]")
    parser.add_argument("--output", metavar="FILE", help="file for the translations, a line each [standard output]")
    parser.add_argument("--beam_size", type=positive, help="hypotheses kept; 1 is greedy [the run's eval.beam_size]")
    parser.add_argument(
        "--length_penalty", type=not_negative_number, help="above 1 prefers longer ones [the run's eval.length_penalty]"
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="sentences at a time [%(default)s]")
    parser.add_argument(
        "--scores", action="store_true", help="before each translation its score, log p / tokens^penalty, and a tab"
    )


TIMES_TOO_LONG = 8
"""Lines of more than so many times the longest training sentence are refused, also where the model's positions go on:
the search takes the square of a line's length in time, and what it finds there is no translation."""


@dataclass(frozen=True)
class Line:
    """A line of the input that has words: its number, from 1, and the tokens of its sentence."""

    number: int
    tokens: list[int]


def run(arguments: argparse.Namespace) -> None:
    """Translate, in the order of the input; an empty line gives an empty line.

    Raises:
        ConfigError: when the run, the language or the input cannot be used; nothing is written then.
    """
    if arguments.text and arguments.input:
        raise ConfigError(Problem("--input", "given beside sentences", "choose one of the two"))
    output = new_file(arguments.output)
    stored = open_run(arguments.run, TRANSLATION)
    tokenizer = PairTokenizer.load(stored.folder / TOKENIZER)
    tag = tokenizer.tag_id(arguments.to)
    texts = _read(arguments)
    lines = _tokenized(texts, tokenizer, stored.config)
    model = stored.load_model()
    with opened(output) as out:
        written = 0
        for number, text in _translated(model, lines, tag, tokenizer, stored, arguments):
            write(out, "\n" * (number - 1 - written) + text + "\n")
            written = number
        write(out, "\n" * (len(texts) - written))


def _read(arguments: argparse.Namespace) -> list[str]:
    """The input's lines."""
    if arguments.text:
        unreadable = [text for text in arguments.text if not is_unicode(text)]
        raise_if([Problem("text", f"{text!r} is not UTF-8", "give it by --input in UTF-8") for text in unreadable])
        return [line for text in arguments.text for line in text.splitlines() or [""]]
    return read_lines(arguments.input, "--input")


def _tokenized(texts: Sequence[str], tokenizer: PairTokenizer, config: TranslationConfig) -> list[Line]:
    """The lines with words. Tells of those that are longer than any that the model was trained on, and refuses what is
    far beyond that."""
    trained = config.data.max_len
    limit = trained if config.model.positions == "learned" else TIMES_TOO_LONG * trained
    lines, refused = [], []
    for number, text in enumerate(texts, start=1):
        words = clean(text)
        # Tokens of no line are counted that can only have too many: of a megabyte it would take long.
        tokens = tokenizer.encode(words) if len(words) <= MAX_PIECE_LENGTH * limit else None
        if tokens is None or len(tokens) > limit:
            refused.append(number)
        elif tokens:
            lines.append(Line(number, tokens))
    if refused:
        what = f"line {refused[0]:,} has more than {limit:,} tokens, and the model was trained on up to {trained:,}"
        raise ConfigError(Problem("text", f"{what}; {len(refused):,} such lines", "split them into sentences"))
    long = [line for line in lines if len(line.tokens) > trained]
    if long:
        numbers = ", ".join(str(line.number) for line in long[:5]) + (", ..." if len(long) > 5 else "")
        print(
            f"warning: {len(long)} lines ({numbers}) are longer than the {config.data.max_len} tokens of the longest "
            "training sentences: expect less of their translations",
            file=sys.stderr,
        )
    return lines


def _translated(
    model: Any,
    lines: Sequence[Line],
    tag: int,
    tokenizer: PairTokenizer,
    stored: StoredRun[TranslationConfig],
    arguments: argparse.Namespace,
) -> Iterator[tuple[int, str]]:
    """(number, translation) of each line."""
    config = stored.config.eval
    penalty = config.length_penalty if arguments.length_penalty is None else arguments.length_penalty
    search = Search(arguments.beam_size or config.beam_size, penalty, stored.config.max_target_len)
    for first in range(0, len(lines), arguments.batch_size):
        some = lines[first : first + arguments.batch_size]
        batch = make_batch([PairItem(line.tokens, None, tag) for line in some])
        found = translate(model, batch.source_BS, tokenizer, search, torch.device("cpu"))
        for line, (text, score) in zip(some, found, strict=True):
            yield line.number, f"{score:.4f}\t{text}" if arguments.scores else text
