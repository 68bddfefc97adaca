"""Choose the next token of every row: settings and random numbers are each row's own.

The order is that of Hugging Face's ``generate``: repetition penalty, temperature, top-k, top-p.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_scale.errors import ConfigError, Problem

_FEW = 1024
"""Most nuclei are smaller: so many of the best tokens are looked at before all are sorted."""

_TINY, _HUGE = 1e-30, 1e30
"""As far as a temperature or a penalty goes: fp32 has numbers beyond, but no longer all that come of them."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are drawn.

    Attributes:
        temperature: the logits are divided by it, from 0; 0 takes the most probable token (greedy).
        top_k: so many of the most probable tokens are drawn from; 0 is all.
        top_p: the fewest most probable tokens that have this probability together are drawn from (nucleus sampling,
            arXiv 1904.09751), above 0; 1 is all.
        repetition_penalty: of tokens that the sequence has, prompt included, positive logits are divided by it and
            negative ones multiplied (CTRL, arXiv 1909.05858, section 4.1), above 0; 1 is none.
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


class Draws:
    """The draws of one sequence: a random number a token, whatever the rest of its batch does.

    Args:
        prompt: the tokens that it begins with. They and ``sample`` go into the seed, so that several samples of a
            prompt differ, and so do the numbers of two prompts with one seed.
        vocab_size: V.
        sample: which sample of the prompt this is.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, sample: int = 0):
        self.sampling = sampling
        key = ",".join(map(str, (sampling.seed, sample, *prompt))).encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        self._generator = torch.Generator().manual_seed(seed)
        self.seen_V: Tensor | None = None
        """bool, the tokens that the sequence has; None where nobody asks."""
        if sampling.repetition_penalty != 1:
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen_V[list(prompt)] = True

    def uniform(self) -> float:
        """The next number from [0, 1)."""
        if self.sampling.temperature == 0:
            return 0.0
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def add(self, token: int) -> None:
        """Take note of a token that the sequence got."""
        if self.seen_V is not None:
            self.seen_V[token] = True


def choose(logits_BV: Tensor, rows: Sequence[Draws]) -> list[int]:
    """The next token of each row. What a row gets depends on its own logits and draws alone.

    Raises:
        ConfigError: when some logits are no numbers, as of a model whose training diverged.
    """
    logits_BV = logits_BV.float()
    if not bool(logits_BV.isfinite().all()):
        what = "the model gives logits that are no numbers: its weights are of no use"
        raise ConfigError(Problem("run", what, "its training diverged; choose an earlier checkpoint"))
    settings = [row.sampling for row in rows]

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor([*values], device=logits_BV.device).unsqueeze(1)

    if any(row.seen_V is not None for row in rows):
        unseen_V = torch.zeros(logits_BV.shape[1], dtype=torch.bool)
        seen_BV = torch.stack([unseen_V if row.seen_V is None else row.seen_V for row in rows]).to(logits_BV.device)
        logits_BV = penalize_repetition(logits_BV, seen_BV, column(s.repetition_penalty for s in settings))
    best_B = logits_BV.argmax(dim=1)
    if all(s.temperature == 0 for s in settings):
        return best_B.tolist()
    # Of differences to the best, none of which overflows whatever the temperature.
    logits_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)) / column(max(s.temperature, _TINY) for s in settings)
    if any(s.top_k for s in settings):
        logits_BV = keep_top_k(logits_BV, [s.top_k for s in settings])
    if any(s.top_p < 1 for s in settings):
        logits_BV = keep_top_p(logits_BV, column(s.top_p for s in settings))
    drawn_B = draw(logits_BV, column(row.uniform() for row in rows))
    greedy_B = column(s.temperature == 0 for s in settings).squeeze(1)
    return torch.where(greedy_B, best_B, drawn_B).tolist()


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty_B1: Tensor) -> Tensor:
    """See :attr:`Sampling.repetition_penalty`; of the tokens in ``seen_BV`` alone. Finite whatever the penalty."""
    penalty_B1 = penalty_B1.clamp(_TINY, _HUGE)
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, penalized_BV.clamp(-_HUGE, _HUGE), logits_BV)


def keep_top_k(logits_BV: Tensor, top_k_B: Sequence[int]) -> Tensor:
    """-inf but for the k largest of each row, and what equals the least of them; 0 keeps the row as it is."""
    vocab_size = logits_BV.shape[1]
    values = logits_BV.topk(min(max(top_k_B), vocab_size), dim=1).values
    places = torch.tensor([[min(k, vocab_size) - 1] for k in top_k_B], device=logits_BV.device)
    least_B1 = values.gather(1, places.clamp(min=0)).masked_fill(places < 0, float("-inf"))
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """-inf but for the fewest largest of each row that have probability p together, and what equals their least."""
    vocab_size = logits_BV.shape[1]
    total_B1 = logits_BV.logsumexp(dim=1, keepdim=True)
    for few in (min(_FEW, vocab_size), vocab_size):
        values = logits_BV.topk(few, dim=1).values
        probs = (values - total_B1).exp()
        mass = probs.cumsum(dim=1)
        if bool(((mass[:, -1:] >= top_p_B1) | (top_p_B1 >= 1)).all()):
            break
    kept = (mass - probs < top_p_B1).sum(dim=1, keepdim=True).clamp(min=1)  # those before which p is not yet reached
    least_B1 = values.gather(1, kept - 1).masked_fill(top_p_B1 >= 1, float("-inf"))
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def draw(logits_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """int64 [B]: in the order of the vocabulary the first token whose cumulative probability exceeds the number."""
    cumulative_BV = logits_BV.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    aim_B1 = (uniform_B1.double() * total_B1).clamp(max=total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BV, aim_B1, right=True).squeeze(1)
