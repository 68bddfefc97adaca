"""Searches against exhaustive ones and against re-scoring, on models small enough for both."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_scale.config import MoEConfig, Seq2SeqConfig
from moe_scale.evaluate.decoding import Hypothesis, Vocabulary, beam_search, greedy
from moe_scale.models.seq2seq import Seq2Seq

PAD, UNK, BOS, EOS, VOCAB = 0, 1, 2, 3, 300
WORDS = Vocabulary(BOS, EOS, (PAD, UNK, BOS))


def build(seed: int = 0, *, sharpness: float = 4.0, **changes: Any) -> Seq2Seq:
    """A random model whose next tokens are far from equally probable, and whose sentences end now and then."""
    config = Seq2SeqConfig(
        vocab_size=VOCAB, num_encoder_layers=1, num_decoder_layers=2, d_model=16, num_heads=2, **changes
    )  # fmt: skip
    model = Seq2Seq(config, MoEConfig(num_experts=4, intermediate_size=8), seed=seed).double().eval()
    with torch.no_grad():
        model.decoder_norm.weight.mul_(sharpness)
        model.embedding.weight[EOS] = model.embedding.weight[5:60].mean(dim=0) * 3
    return model


def sources(*lengths: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(4, VOCAB, (length,))
    return ids


@torch.no_grad()
def rescored(model: Seq2Seq, source_S: Tensor, ids: list[int]) -> float:
    """log p of a translation by one forward pass over all of it."""
    inputs = torch.tensor([[BOS, *ids[:-1]]])
    log_probs = model(source_S.unsqueeze(0), inputs).log_softmax(dim=-1)[0]
    return float(log_probs.gather(1, torch.tensor(ids).unsqueeze(1)).sum())


@torch.no_grad()
def uncached_greedy(model: Seq2Seq, source_S: Tensor, max_len: int) -> list[int]:
    """Every token from a forward pass over the whole of what is there so far."""
    ids: list[int] = []
    while not ids or ids[-1] != EOS:
        if len(ids) == max_len - 1:
            return [*ids, EOS]
        logits = model(source_S.unsqueeze(0), torch.tensor([[BOS, *ids]]))[0, -1]
        logits[list(WORDS.never)] = float("-inf")
        ids.append(int(logits.argmax()))
    return ids


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
@pytest.mark.parametrize("seed", range(3))
def test_cached_greedy_is_uncached_greedy(seed: int, positions: str) -> None:
    model, source, max_lens = build(seed, positions=positions), sources(5, 2, 7, 1), [9, 12, 6, 1]
    found = greedy(model, source, max_lens, WORDS)
    for row, max_len, hypothesis in zip(source, max_lens, found, strict=True):
        alone = row[row != PAD]
        assert hypothesis.ids == uncached_greedy(model, alone, max_len)
        assert hypothesis.log_prob == pytest.approx(rescored(model, alone, hypothesis.ids), abs=1e-4)
    assert len({len(hypothesis.ids) for hypothesis in found}) > 1, "sentences of one batch end at different steps"


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    model, source, max_lens = build(seed), sources(5, 2, 7, 3, seed=seed), [9, 12, 6, 8]
    by_beam = beam_search(model, source, max_lens, WORDS, beam_size=1, length_penalty=0.7)
    assert [best.ids for (best,) in by_beam] == [h.ids for h in greedy(model, source, max_lens, WORDS)]


@pytest.mark.parametrize("beam_size", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_a_beam_are_those_of_a_forward_pass(seed: int, beam_size: int) -> None:
    model, source = build(seed, sharpness=2.0), sources(5, 2, 7)
    for row, found in zip(
        source, beam_search(model, source, [9, 12, 6], WORDS, beam_size=beam_size, length_penalty=0.6), strict=True
    ):
        assert len(found) == beam_size
        assert len({tuple(h.ids) for h in found}) == beam_size
        for hypothesis in found:
            assert hypothesis.ids[-1] == EOS
            assert EOS not in hypothesis.ids[:-1]
            assert not set(hypothesis.ids) & set(WORDS.never)
            assert hypothesis.log_prob == pytest.approx(rescored(model, row[row != PAD], hypothesis.ids), abs=1e-4)
        scores = [h.score(0.6) for h in found]
        assert scores == sorted(scores, reverse=True)


def test_a_batch_is_its_sentences_one_by_one() -> None:
    model, source, max_lens = build(7), sources(5, 2, 7, 4), [9, 4, 6, 11]
    together = beam_search(model, source, max_lens, WORDS, beam_size=3, length_penalty=1.0)
    for row, max_len, found in zip(source, max_lens, together, strict=True):
        (alone,) = beam_search(
            model, row[row != PAD].unsqueeze(0), [max_len], WORDS, beam_size=3, length_penalty=1.0
        )  # fmt: skip
        assert [h.ids for h in found] == [h.ids for h in alone]


class Markov:
    """A model of four tokens whose next depends on the last alone; 3 ends. Small enough to try every translation."""

    class State:
        def __init__(self, length: int):
            self.length = length

        def select(self, rows: Tensor) -> Markov.State:
            return self

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.logits = 2 * torch.randn(4, 4)

    def __call__(self, ids: Tensor, state: State | None = None) -> Any:
        if state is None:
            return Markov.State(0)
        return self.logits[ids[:, 0]], Markov.State(state.length + 1)

    def log_prob(self, ids: tuple[int, ...]) -> float:
        steps = self.logits.log_softmax(dim=-1)
        return sum(float(steps[a, b]) for a, b in itertools.pairwise((2, *ids)))


@pytest.mark.parametrize("seed", range(20))
def test_a_wide_beam_finds_the_most_probable_of_all(seed: int) -> None:
    """With room for every beginning nothing is missed: all translations of up to 4 tokens are tried here."""
    model, words = Markov(seed), Vocabulary(2, 3, (2,))
    every = [(*middle, 3) for length in range(4) for middle in itertools.product((0, 1), repeat=length)]
    (found,) = beam_search(model, torch.ones(1, 1).long(), [4], words, beam_size=16, length_penalty=0.0)
    best = max(every, key=model.log_prob)
    assert tuple(found[0].ids) == best
    assert found[0].log_prob == pytest.approx(model.log_prob(best), abs=1e-5)


def test_length_penalty_prefers_longer_ones() -> None:
    short, long = Hypothesis([5, 3], -4.0), Hypothesis([5, 6, 7, 3], -6.0)
    assert short.score(0.0) > long.score(0.0)
    assert short.score(1.0) < long.score(1.0)
    assert long.score(1.0) == -1.5


def test_logits_that_are_no_numbers_end_as_others_do() -> None:
    """A rank that failed here would leave the others waiting."""
    model, words = Markov(0), Vocabulary(2, 3, (2,))
    model.logits[:] = float("nan")
    (found,) = beam_search(model, torch.ones(1, 1).long(), [4], words, beam_size=2, length_penalty=1.0)
    assert found[0].ids[-1] == 3
    assert len(found[0].ids) <= 4
    assert greedy(model, torch.ones(1, 1).long(), [4], words)[0].ids[-1] == 3
