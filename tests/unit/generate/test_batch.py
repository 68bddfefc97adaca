"""The running batch: with the cache as without, and for a sequence as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.generate.batch import Batch, Event, Finish, Request, generate, left_padded
from moe_scale.generate.full_passes import FullPasses, sample_ids
from moe_scale.generate.sampling import Sampling
from moe_scale.models.decoder import DecoderLM

CPU = torch.device("cpu")
CONFIG = DecoderConfig(vocab_size=64, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2)
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)


class Letters:
    """60 tokens of one letter each, and the end of a text."""

    vocab_size, eot_id = 61, 60

    def decode(self, ids: list[int]) -> str:
        return "".join("|" if token == 60 else chr(ord("0") + token) for token in ids)


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return DecoderLM(CONFIG, MOE, seed=1).eval()


def a_batch(model: Any, context: int = 64) -> Batch[Any]:
    return Batch(model, Letters(), context=context, device=CPU)


REQUESTS = [
    Request([60, 1, 2, 3], 12, Sampling(temperature=1.5, seed=3)),
    Request([60], 20, Sampling(top_k=5)),
    Request([60, 1, 2, 3], 12, Sampling(temperature=1.5, seed=3), sample=1),
    Request([5] * 9, 3, Sampling(temperature=0)),
    Request([7, 8], 15, Sampling(top_p=0.8, repetition_penalty=1.3)),
    Request([60, 9, 9], 30, Sampling(temperature=2.0, seed=9), stop=tuple("0123456789A")),
]


def outcome(events: list[Event[Any]]) -> dict[Any, tuple[list[int], str, Finish | None]]:
    """Tokens, text and end of each sequence."""
    found: dict[Any, tuple[list[int], str, Finish | None]] = {}
    for key, token, text, finish in events:
        tokens, so_far, ended = found.get(key, ([], "", None))
        assert ended is None, "nothing comes after the end"
        found[key] = ([*tokens, token], so_far + text, finish)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6])
def test_batch_mates_and_the_cache_change_nothing(batch_size: int, model: DecoderLM) -> None:
    without = FullPasses(partial(model, last_only=True), window=64)
    alone = {
        number: outcome(list(generate(a_batch(without), [(number, request)], 1)))[number]
        for number, request in enumerate(REQUESTS)
    }
    assert len({tuple(tokens) for tokens, _, _ in alone.values()}) == len(REQUESTS)
    together = outcome(list(generate(a_batch(model), enumerate(REQUESTS), batch_size)))
    assert together == alone
    assert {finish for _, _, finish in together.values()} == {"stop", "length"}


def test_who_joins_and_who_leaves_changes_nothing(model: DecoderLM) -> None:
    alone = outcome(list(generate(a_batch(model), [("kept", REQUESTS[1])], 1)))["kept"]
    batch = a_batch(model)
    events = batch.step([("gone", REQUESTS[0]), ("kept", REQUESTS[1])])
    events += batch.step([("late", REQUESTS[3])])
    batch.drop({"gone", "unknown"})
    assert len(batch) == 2
    while some := batch.step():
        events += some
    assert outcome([event for event in events if event.key == "kept"])["kept"] == alone
    assert outcome(events)["gone"][2] is None
    assert len(batch) == 0
    batch.step([("again", REQUESTS[1])])
    batch.drop({"again"})
    assert batch.step() == []


def test_the_end_of_a_text(model: DecoderLM) -> None:
    """A model that always gives the end of text, drawn or spelled out."""

    def ends(ids_BS: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([[60]]), 64).float() * 100

    request = Request([1], 3, Sampling(temperature=0))
    batch = a_batch(FullPasses(ends, 64))
    assert batch.step([(0, request)]) == [Event(0, 60, "", "stop")]
    spelled = outcome(list(generate(batch, [(0, replace(request, stop_at_eot=False))], 1)))
    assert spelled == {0: ([60, 60, 60], "|||", "length")}


def test_rows_of_the_embedding_without_a_token_are_never_drawn(model: DecoderLM) -> None:
    def padding(ids_BS: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([[63]]), 64).float() * 100

    events = a_batch(FullPasses(padding, 64)).step((n, Request([1], 1, Sampling(seed=n))) for n in range(50))
    assert len({event.token for event in events}) > 10
    assert max(event.token for event in events) <= 60


@pytest.mark.parametrize(("context", "limit"), [(10, None), (40, 10)])
def test_the_context_ends_a_text(context: int, limit: int | None, model: DecoderLM) -> None:
    class Learned(DecoderLM):
        max_positions = limit

    learned = Learned(CONFIG, MOE, seed=1).eval()
    request = Request([5, 6, 7], 30, Sampling(temperature=0), stop_at_eot=False)
    tokens, _, finish = outcome(list(generate(a_batch(learned, context), [(0, request)], 1)))[0]
    assert (len(tokens), finish) == (7, "length")


def test_left_padding() -> None:
    ids_BS, valid_BS = left_padded([[1, 2, 3], [4]], CPU)
    assert ids_BS.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert valid_BS is not None
    assert valid_BS.tolist() == [[True] * 3, [False, False, True]]
    assert left_padded([[1, 2], [3, 4]], CPU)[1] is None


def test_a_sample_sees_its_window_alone(model: DecoderLM) -> None:
    widths = []

    def forward(ids_BS: torch.Tensor) -> torch.Tensor:
        widths.append(ids_BS.shape[1])
        return model(ids_BS, last_only=True)

    ids = sample_ids(forward, Letters(), [1, 2, 3], num_tokens=5, window=5, seed=0, device=CPU)
    assert widths == [3, 4, 5, 5, 5]
    assert len(ids) == 5
    assert ids == sample_ids(forward, Letters(), [1, 2, 3], num_tokens=5, window=5, seed=0, device=CPU)
    assert ids != sample_ids(forward, Letters(), [1, 2, 3], num_tokens=5, window=5, seed=1, device=CPU)
