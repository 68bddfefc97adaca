"""The choice of a token: against Hugging Face's processors, by its frequencies, and row by row.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moe_scale.errors import ConfigError
from moe_scale.generate.sampling import Draws, Sampling, choose, draw, keep_top_k, keep_top_p, penalize_repetition

VOCAB = 3001  # more than the few best that a nucleus is looked for in first


def some_logits(rows: int = 6, scale: float = 3.0, seed: int = 0) -> Tensor:
    """Rows between flat and peaked."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * torch.linspace(0.1, scale, rows).unsqueeze(1)


@pytest.mark.parametrize("top_k", [1, 2, 50, 1500, VOCAB, 10 * VOCAB])
def test_top_k_is_hugging_faces(top_k: int) -> None:
    logits_BV = some_logits()
    assert torch.equal(keep_top_k(logits_BV, [top_k] * 6), TopKLogitsWarper(top_k)(None, logits_BV))


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 40])
def test_top_p_is_hugging_faces(top_p: float, top_k: int) -> None:
    logits_BV = some_logits()
    if top_k:
        logits_BV = TopKLogitsWarper(top_k)(None, logits_BV)
    expected = TopPLogitsWarper(top_p)(None, logits_BV)
    assert torch.equal(keep_top_p(logits_BV, torch.full((6, 1), top_p)), expected)


def test_equal_logits_stand_or_fall_together() -> None:
    logits_BV = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert torch.equal(keep_top_k(logits_BV, [2]), TopKLogitsWarper(2)(None, logits_BV))
    assert keep_top_k(logits_BV, [2]).isfinite().tolist() == [[True, True, True, False]]
    assert keep_top_p(logits_BV, torch.tensor([[0.7]])).isfinite().tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_hugging_faces(penalty: float) -> None:
    logits_BV = some_logits(2)
    ids_BS = torch.tensor([[5, 5, 7, 2999], [0, 1, 2, 0]])
    seen_BV = torch.zeros(2, VOCAB, dtype=torch.bool).scatter(1, ids_BS, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids_BS, logits_BV)
    assert torch.equal(penalize_repetition(logits_BV, seen_BV, torch.full((2, 1), penalty)), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 20},
        {"temperature": 0.5, "top_p": 0.9},
        {"top_k": 100, "top_p": 0.5, "repetition_penalty": 1.2},
        {"temperature": 2.0, "top_k": 30, "top_p": 0.95, "repetition_penalty": 2.0},
    ],
    ids=str,
)
def test_all_together_draw_from_what_hugging_face_keeps(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn from has the probabilities that a chain of theirs gives."""
    kept: list[Tensor] = []

    def spy(logits_BV: Tensor, uniform_B1: Tensor) -> Tensor:
        kept.append(logits_BV)
        return draw(logits_BV, uniform_B1)

    monkeypatch.setattr("moe_scale.generate.sampling.draw", spy)
    logits_BV, prompt, sampling = some_logits(3), [3, 14, 15, 92], Sampling(**settings)
    rows = [Draws(sampling, prompt, VOCAB) for _ in range(3)]
    for row in rows:
        row.add(65)
    choose(logits_BV, rows)
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    expected = chain(torch.tensor([[*prompt, 65]] * 3), logits_BV).softmax(dim=1)
    torch.testing.assert_close(kept[0].softmax(dim=1), expected, rtol=1e-5, atol=1e-7)


def test_frequencies_are_the_probabilities() -> None:
    """20,000 draws, chi-squared: 9 degrees of freedom exceed 33.7 once in ten thousand."""
    logits_V = torch.tensor([0.0, -1.0, 2.0, float("-inf"), 0.5, 0.1, -2.0, 1.0, 0.3, -0.4, 1.5])
    uniform_B1 = torch.rand(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits_V.expand(20_000, -1), uniform_B1), minlength=11)
    expected = 20_000 * logits_V.softmax(dim=0)
    assert counts[3] == 0
    possible = expected > 0
    assert ((counts - expected)[possible].square() / expected[possible]).sum() < 33.7


def test_a_number_at_either_end_draws_what_is_possible() -> None:
    logits_BV = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]] * 2)
    ends = torch.tensor([[0.0], [math.nextafter(1, 0)]], dtype=torch.float64)
    assert draw(logits_BV, ends).tolist() == [1, 2]


def test_temperature_0_is_greedy_and_small_ones_come_near() -> None:
    logits_BV = some_logits(4)
    best = logits_BV.argmax(dim=1).tolist()
    for temperature in (0.0, 1e-38, 1e-6):
        rows = [Draws(Sampling(temperature=temperature, top_p=0.9, top_k=5), [1], VOCAB) for _ in range(4)]
        assert choose(logits_BV, rows) == best


def test_a_row_gets_what_it_gets_alone() -> None:
    """Whatever the settings of the other rows: each of their steps is an option that the batch takes together."""
    settings = [
        Sampling(),
        Sampling(temperature=0),
        Sampling(top_k=7, seed=1),
        Sampling(top_p=0.6, temperature=1.4),
        Sampling(top_k=900, top_p=0.99),
        Sampling(repetition_penalty=1.5, top_p=0.999, temperature=3.0),
    ]
    prompts = [[number, 2 * number] for number in range(6)]

    def rows() -> list[Draws]:
        return [Draws(sampling, prompt, VOCAB) for sampling, prompt in zip(settings, prompts, strict=True)]

    together, alone = rows(), rows()
    for seed in range(20):
        logits_BV = some_logits(seed=seed)
        chosen = choose(logits_BV, together)
        assert chosen == [choose(logits_BV[n : n + 1], [row])[0] for n, row in enumerate(alone)]
        for both in (together, alone):
            for row, token in zip(both, chosen, strict=True):
                row.add(token)
        reverse = choose(logits_BV.flip(0), rows()[::-1])
        assert reverse[::-1] == choose(logits_BV, rows())


def test_seeds() -> None:
    def numbers(prompt: list[int], seed: int = 0, sample: int = 0) -> list[float]:
        row = Draws(Sampling(seed=seed), prompt, VOCAB, sample)
        return [row.uniform() for _ in range(3)]

    assert numbers([1, 2]) == numbers([1, 2])
    different = [numbers([1, 2]), numbers([1, 2], seed=1), numbers([1, 2], sample=1), numbers([2, 1]), numbers([12])]
    assert len({tuple(row) for row in different}) == 5
    assert all(0 <= number < 1 for row in different for number in row)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told_of(bad: float) -> None:
    logits_BV = some_logits(2)
    logits_BV[1, 5] = bad
    with pytest.raises(ConfigError, match="no numbers"):
        choose(logits_BV, [Draws(Sampling(), [1], VOCAB)] * 2)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e300])
@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
def test_numbers_beyond_fp32_neither_break_a_draw_nor_the_draws_beside_it(penalty: float, temperature: float) -> None:
    logits_BV = torch.tensor([[3.0, 2.0, 0.0, -1.0], [3.0, 2.0, 0.0, -1.0]])
    seen = [1, 2, 3]
    hostile = Draws(Sampling(temperature, repetition_penalty=penalty), seen, 4)
    drawn, beside = choose(logits_BV, [hostile, Draws(Sampling(1.0, seed=5), seen, 4)])
    (alone,) = choose(logits_BV[1:], [Draws(Sampling(1.0, seed=5), seen, 4)])
    assert beside == alone
    if temperature < 1:
        assert drawn == (1 if penalty < 1 else 0), "the most probable token"
    assert 0 <= drawn < 4
