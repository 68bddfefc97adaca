"""Write translations token by token, with the keys and values of earlier tokens kept: greedily, or by a beam.

With a sharded model every forward pass is collective, so all ranks call these functions together, each with sources of
its own, and go on until the last of them has finished.

Shapes: B sentences, S source tokens, W hypotheses a sentence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_scale.parallel.collectives import any_over_ranks

Model = Callable[..., Any]
"""A :class:`moe_scale.models.seq2seq.Seq2Seq` in evaluation mode, or an engine around one."""


IMPOSSIBLE = -1e4
"""The least log-probability of a token that may follow, nats."""


class Hypothesis(NamedTuple):
    """A translation."""

    ids: list[int]
    """Its tokens, the last of which ends it."""
    log_prob: float
    """Sum of their log-probabilities, nats."""

    def score(self, length_penalty: float) -> float:
        """log p / n^penalty over its n tokens (arXiv 1609.08144, section 7, in the simple form of most toolkits)."""
        return self.log_prob / len(self.ids) ** length_penalty


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that mean something to a search.

    Attributes:
        bos_id: what every target starts from.
        eos_id: what ends it.
        never: tokens that no translation may hold, such as padding. Their share of the probability stays with them.
    """

    bos_id: int
    eos_id: int
    never: tuple[int, ...] = ()

    def log_probs(self, logits: Tensor, only_end: Tensor) -> Tensor:
        """fp32 log-probabilities [..., V]; -inf for what may not follow.

        Args:
            only_end: bool [...], True where the translation has its full length and must end.
        """
        # Of logits that are no numbers a search would never find an end, and its rank keep all others waiting.
        log_probs = logits.float().log_softmax(dim=-1).nan_to_num(nan=IMPOSSIBLE).clamp(min=IMPOSSIBLE)
        end = log_probs[..., self.eos_id].clone()
        log_probs[..., list(self.never)] = float("-inf")
        log_probs[only_end] = float("-inf")
        log_probs[..., self.eos_id] = end
        return log_probs


@torch.no_grad()
def greedy(model: Model, source_BS: Tensor, max_lens: Sequence[int], words: Vocabulary) -> list[Hypothesis]:
    """The most probable token after another.

    Args:
        source_BS: int64 sources, padded; at least one.
        max_lens: tokens that each translation may have, the end included.
    """
    state = model(source_BS)
    limit_B = torch.tensor(max_lens, device=source_BS.device)
    tokens_B = torch.full((len(source_BS),), words.bos_id, device=source_BS.device)
    running = list(range(len(source_BS)))  # the sentence of each row
    ids: list[list[int]] = [[] for _ in running]
    log_probs = [0.0 for _ in running]
    while any_over_ranks(bool(running)):
        logits, state = model(tokens_B.unsqueeze(1), state=state)
        if not running:  # the last row goes on for the sake of other ranks
            continue
        best = words.log_probs(logits, limit_B <= state.length).max(dim=-1)
        for sentence, log_prob, token in zip(running, best.values.tolist(), best.indices.tolist(), strict=True):
            ids[sentence].append(token)
            log_probs[sentence] += log_prob
        going_on = best.indices != words.eos_id
        tokens_B = best.indices
        if not bool(going_on.all()):
            rows = going_on.nonzero().flatten()
            running = [running[row] for row in rows.tolist()]
            kept = rows if running else rows.new_zeros(1)
            state, tokens_B, limit_B = state.select(kept), tokens_B[kept], limit_B[kept]
    return [Hypothesis(*found) for found in zip(ids, log_probs, strict=True)]


@torch.no_grad()
def beam_search(
    model: Model,
    source_BS: Tensor,
    max_lens: Sequence[int],
    words: Vocabulary,
    *,
    beam_size: int,
    length_penalty: float,
) -> list[list[Hypothesis]]:
    """The best translations found when the ``beam_size`` most probable beginnings are continued at each step.

    A sentence is done when so many of its hypotheses have ended while among the most probable, or at its full length.
    With ``beam_size`` 1 it is :func:`greedy`.

    Args:
        source_BS: int64 sources, padded; at least one.
        max_lens: tokens that each translation may have, the end included.
        length_penalty: of :meth:`Hypothesis.score`, by which those that ended are ranked.

    Returns:
        for each sentence up to ``beam_size`` hypotheses, best first.
    """
    device, width = source_BS.device, beam_size
    state = model(source_BS)
    state = state.select(torch.arange(len(source_BS), device=device).repeat_interleave(width))
    limit_B = torch.tensor(max_lens, device=device)
    beams = [_Beam(width) for _ in max_lens]
    running = list(beams)
    # All hypotheses of a sentence begin equal: one of them, not all, is continued first.
    log_probs_BW = torch.full((len(beams), width), float("-inf"), device=device)
    log_probs_BW[:, 0] = 0.0
    tokens_BW = torch.full((len(beams), width), words.bos_id, device=device)
    while any_over_ranks(bool(running)):
        logits, state = model(tokens_BW.reshape(-1, 1), state=state)
        if not running:  # the last rows go on for the sake of other ranks
            continue
        next_BWV = words.log_probs(logits.view(len(running), width, -1), limit_B <= state.length)
        vocab_size = next_BWV.shape[-1]
        # Twice as many as are kept: should all ends be among them, as many are left that go on.
        best = (log_probs_BW.unsqueeze(-1) + next_BWV).flatten(1).topk(min(2 * width, width * vocab_size), dim=1)
        choices = zip(running, best.values.tolist(), best.indices.tolist(), strict=True)
        steps = [beam.step(values, places, vocab_size, words.eos_id) for beam, values, places in choices]

        going_on = [row for row, beam in enumerate(running) if not beam.done]
        running = [running[row] for row in going_on]
        going_on = going_on or [0]
        parents_BW = torch.tensor([steps[row].parents for row in going_on], device=device)
        rows_B = torch.tensor(going_on, device=device)
        state = state.select((rows_B.unsqueeze(1) * width + parents_BW).flatten())
        tokens_BW = torch.tensor([steps[row].tokens for row in going_on], device=device)
        log_probs_BW = torch.tensor([steps[row].log_probs for row in going_on], device=device)
        limit_B = limit_B[rows_B]
    return [beam.ranked(length_penalty) for beam in beams]


class _Step(NamedTuple):
    """How the W hypotheses of a sentence go on: from which earlier ones, by which tokens, how probable by then."""

    parents: list[int]
    tokens: list[int]
    log_probs: list[float]


class _Beam:
    """The hypotheses of one sentence."""

    def __init__(self, width: int):
        self.width = width
        self.ids: list[list[int]] = [[] for _ in range(width)]
        self.ended: list[Hypothesis] = []
        self.done = False

    def step(self, values: list[float], places: list[int], vocab_size: int, eos_id: int) -> _Step:
        """Take in the most probable continuations, best first: their log-probabilities and places in [W * V]."""
        going_on = _Step([], [], [])
        for rank, (log_prob, place) in enumerate(zip(values, places, strict=True)):
            parent, token = divmod(place, vocab_size)
            if token == eos_id:
                if rank < self.width and log_prob > float("-inf"):
                    self.ended.append(Hypothesis([*self.ids[parent], token], log_prob))
            elif len(going_on.tokens) < self.width:
                going_on.parents.append(parent)
                going_on.tokens.append(token)
                going_on.log_probs.append(log_prob)
        missing = self.width - len(going_on.tokens)  # of a vocabulary as small as the beam
        going_on.parents.extend([0] * missing)
        going_on.tokens.extend([eos_id] * missing)
        going_on.log_probs.extend([float("-inf")] * missing)
        self.ids = [[*self.ids[parent], token] for parent, token in zip(going_on.parents, going_on.tokens, strict=True)]
        self.done = len(self.ended) >= self.width or max(going_on.log_probs) == float("-inf")
        return going_on

    def ranked(self, length_penalty: float) -> list[Hypothesis]:
        found = sorted(self.ended, key=lambda hypothesis: hypothesis.score(length_penalty), reverse=True)
        return found[: self.width]
