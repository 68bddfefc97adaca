"""``translation`` spread over ranks: one curve in every layout, one set of translations, and an exact resume."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.curves import STEPS, Curve, TranslationRuns, assert_same


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TranslationRuns:
    return TranslationRuns(tmp_path_factory.mktemp("runs"))


ONE_RANK = {
    "one": (0, ()),
    "zero3": (3, ()),
    "deepspeed": (3, ("--moe.backend", "deepspeed")),
    "autoep": (3, ("--moe.backend", "autoep")),
}
TWO_RANKS = {
    "two-ep2": (3, ("--moe.ep_size", "2")),
    "two-deepspeed": (3, ("--moe.backend", "deepspeed", "--moe.ep_size", "2")),
    "two-autoep": (3, ("--moe.backend", "autoep", "--moe.ep_size", "2")),
    "two-zero2": (2, ()),
}


MUST = ("--resume", "must")


@pytest.fixture(scope="module")
def one_rank(runs: TranslationRuns) -> dict[str, Curve]:
    cases: dict[str, Any] = {
        name: runs.argv(name, 1, stage=stage, extra=flags) for name, (stage, flags) in ONE_RANK.items()
    }
    # Half a run, continued at once, and the same to be continued on two ranks.
    cases["half"] = runs.argv("moved", 1, stage=3, extra=("--max_steps", "9"))
    cases["copy"] = {"copy": [[str(runs.folder / "moved"), str(runs.folder / "stayed")]]}
    cases["stayed"] = runs.argv("stayed", 1, stage=3, extra=MUST)
    runs.run(1, cases)
    return {name: runs.curve(name) for name in (*ONE_RANK, "stayed")}


@pytest.fixture(scope="module")
def two_ranks(runs: TranslationRuns, one_rank: dict[str, Curve]) -> dict[str, Curve]:
    cases = {name: runs.argv(name, 2, stage=stage, extra=flags) for name, (stage, flags) in TWO_RANKS.items()}
    flags = (*MUST, "--moe.ep_size", "2", "--moe.backend", "deepspeed")
    return runs.train(2, cases | {"moved": runs.argv("moved", 2, stage=3, extra=flags)})


def test_every_backend_and_stage_gives_one_curve(one_rank: dict[str, Curve]) -> None:
    curve = one_rank["one"]
    assert len(curve) == STEPS
    assert curve[0][0] - 0.5 > curve[-1][0], "the model must learn something for its curve to say something"
    assert_same({name: one_rank[name] for name in ONE_RANK}, curve)


@pytest.mark.timeout(600)
def test_two_ranks_give_the_curve_and_the_translations_of_one(
    runs: TranslationRuns, one_rank: dict[str, Curve], two_ranks: dict[str, Curve]
) -> None:
    """Ranks have other sentences, which end after other numbers of steps: no rank may wait for ever."""
    assert_same({name: two_ranks[name] for name in TWO_RANKS}, one_rank["one"])
    expected = runs.translations("one")
    assert len(expected) == 2 * 8
    every = (*ONE_RANK, *TWO_RANKS)
    assert {name: runs.translations(name) == expected for name in every} == dict.fromkeys(every, True)
    scores = json.loads((runs.folder / "two-ep2" / "test_scores.json").read_text())["scores"]
    assert set(scores) == {"greedy", "beam", "copy", "nearest"}
    assert set(scores["beam"]) == {"en-de", "de-en", "overall"}


def test_a_run_goes_on_where_it_was_on_another_number_of_ranks(
    runs: TranslationRuns, one_rank: dict[str, Curve], two_ranks: dict[str, Curve]
) -> None:
    stayed = one_rank["stayed"]
    assert_same({"moved": two_ranks["moved"]}, stayed)
    assert len(stayed) == STEPS
    lines = (runs.folder / "moved" / "metrics.jsonl").read_text().splitlines()
    tokens = [json.loads(line)["tokens"] for line in lines]
    assert tokens == sorted(tokens)
    assert tokens[-1] > 1000
