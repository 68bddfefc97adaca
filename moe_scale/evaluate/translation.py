"""How well a model translates held-out sentences: its loss, and BLEU and chrF of what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_scale.data.pairs.batches import NO_PAIR, PairBatch
from moe_scale.data.pairs.sentences import clean
from moe_scale.data.pairs.tokenizer import PairTokenizer
from moe_scale.evaluate.decoding import Vocabulary, beam_search, greedy
from moe_scale.evaluate.text_metrics import TextScores, text_scores
from moe_scale.parallel.collectives import sum_over_ranks


class LossScores(NamedTuple):
    """The loss of held-out pairs, over all ranks."""

    loss: float
    """Mean -log p(target token), nats, without label smoothing."""
    perplexity: float
    """exp(loss)."""
    targets: int
    """Target tokens scored."""


@dataclass(frozen=True)
class Search:
    """How translations are searched for.

    Attributes:
        beam_size: hypotheses that are kept; 1 searches greedily.
        length_penalty: see :meth:`moe_scale.evaluate.decoding.Hypothesis.score`.
        max_len: tokens that the translation of a source of so many tokens may have.
    """

    beam_size: int
    length_penalty: float
    max_len: Callable[[int], int]


@torch.no_grad()
def score_pairs(model: Callable[..., Any], batches: Iterable[PairBatch], device: torch.device) -> LossScores:
    """Score held-out batches. All ranks must call it together with the same number of batches.

    Args:
        model: the engine (or a bare model) in evaluation mode.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        output = model(batch.source_BS.to(device), batch.inputs_BT.to(device), batch.targets_BT.to(device))
        total += torch.tensor([float(output.lm_loss) * float(output.num_targets), float(output.num_targets)])
    nats, targets = sum_over_ranks(total.to(device)).tolist()
    loss = nats / max(targets, 1.0)
    return LossScores(loss, math.exp(min(loss, 700.0)), int(targets))


def translate(
    model: Callable[..., Any], source_BS: Tensor, tokenizer: PairTokenizer, search: Search, device: torch.device
) -> list[tuple[str, float]]:
    """Translations of a batch of sources, and their scores. All ranks must call it together.

    Args:
        model: the engine (or a bare model) in evaluation mode.
        source_BS: language tag, tokens and end of each source, padded.
    """
    lengths: list[int] = (source_BS != tokenizer.pad_id).sum(dim=1).tolist()
    limits = [search.max_len(length) for length in lengths]
    tags = [tokenizer.tag_id(language) for language in tokenizer.languages]
    words = Vocabulary(
        tokenizer.bos_id, tokenizer.eos_id, (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, *tags)
    )
    source_BS = source_BS.to(device)
    if search.beam_size == 1:
        best = greedy(model, source_BS, limits, words)
    else:
        size, penalty = search.beam_size, search.length_penalty
        found = beam_search(model, source_BS, limits, words, beam_size=size, length_penalty=penalty)
        best = [hypotheses[0] for hypotheses in found]
    # Cleaned as what a model learns from is: bytes that it was never shown could spell the end of a line.
    return [(clean(tokenizer.decode(h.ids)), h.score(search.length_penalty)) for h in best]


def translate_batches(
    model: Callable[..., Any],
    batches: Iterable[PairBatch],
    tokenizer: PairTokenizer,
    search: Search,
    device: torch.device,
) -> dict[int, str]:
    """Translations of held-out pairs by their numbers, those of all ranks on every rank.

    All ranks must call it together with the same number of batches.
    """
    mine: dict[int, str] = {}
    for batch in batches:
        found = translate(model, batch.source_BS, tokenizer, search, device)
        for number, (text, _) in zip(batch.indices_B.tolist(), found, strict=True):
            if number != NO_PAIR:
                mine[number] = text
    everyones: list[dict[int, str]] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyones = [{}] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
    return {number: text for theirs in everyones for number, text in theirs.items()}


OVERALL = "overall"


def scores_by_direction(
    translations: Mapping[int, str], references: Mapping[int, str], directions: Mapping[int, str]
) -> dict[str, TextScores]:
    """BLEU and chrF of each direction and, as :data:`OVERALL`, of all sentences as one corpus."""
    numbers = sorted(translations)
    found = {}
    for direction in [*sorted({directions[n] for n in numbers}), OVERALL]:
        some = [n for n in numbers if direction in (OVERALL, directions[n])]
        found[direction] = text_scores([translations[n] for n in some], [references[n] for n in some])
    return found
