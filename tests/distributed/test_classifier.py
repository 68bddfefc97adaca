"""``classifier`` spread over ranks: one curve in every layout, the same predictions, and an exact resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.curves import STEPS, ClassifierRuns, Curve, assert_same


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> ClassifierRuns:
    return ClassifierRuns(tmp_path_factory.mktemp("runs"))


ONE_RANK = {
    "one": (0, ()),
    "zero3": (3, ()),
    "deepspeed": (3, ("--moe.backend", "deepspeed")),
    "autoep": (3, ("--moe.backend", "autoep")),
}
MUST = ("--resume", "must")
TWO_RANKS = {
    "two-ep2": (3, ("--moe.ep_size", "2")),
    "two-deepspeed": (3, ("--moe.backend", "deepspeed", "--moe.ep_size", "2")),
    "two-zero2": (2, ()),
}


@pytest.fixture(scope="module")
def one_rank(runs: ClassifierRuns) -> dict[str, Curve]:
    cases = {name: runs.argv(name, 1, stage=stage, extra=flags) for name, (stage, flags) in ONE_RANK.items()}
    # Half a run, continued at once, and another, to be continued on two ranks.
    half = ("--max_steps", "9")
    cases["begun"] = runs.argv("stayed", 1, stage=3, extra=half)
    cases["stayed"] = runs.argv("stayed", 1, stage=3, extra=MUST)
    cases["moved"] = runs.argv("moved", 1, stage=3, extra=half)
    runs.run(1, cases)
    return {name: runs.curve(name) for name in (*ONE_RANK, "stayed")}


def test_every_backend_and_stage_gives_one_curve(one_rank: dict[str, Curve]) -> None:
    curve = one_rank["one"]
    assert len(curve) == STEPS
    assert curve[0][0] != curve[-1][0]
    assert_same({name: one_rank[name] for name in ONE_RANK}, curve)


@pytest.mark.timeout(600)
def test_two_ranks_give_the_curve_and_the_predictions_of_one(runs: ClassifierRuns, one_rank: dict[str, Curve]) -> None:
    """And a run goes on where it was: on one rank, and, with another backend, on two."""
    stayed = one_rank["stayed"]
    cases = {name: runs.argv(name, 2, stage=stage, extra=flags) for name, (stage, flags) in TWO_RANKS.items()}
    flags = (*MUST, "--moe.ep_size", "2", "--moe.backend", "deepspeed")
    found = runs.train(2, cases | {"moved": runs.argv("moved", 2, stage=3, extra=flags)})
    assert_same({"moved": found.pop("moved")}, stayed)
    assert len(stayed) == STEPS
    assert_same(found, one_rank["one"])
    expected = runs.predictions("one")
    assert [line["example"] for line in expected] == list(range(40))
    for name in (*ONE_RANK, *TWO_RANKS):
        predictions = runs.predictions(name)
        assert [line["text"] for line in predictions] == [line["text"] for line in expected], name
        for mine, other in zip(predictions, expected, strict=True):
            np.testing.assert_allclose(mine["probabilities"], other["probabilities"], atol=1e-4, err_msg=name)
    tokens = [json.loads(line)["tokens"] for line in (runs.folder / "moved" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line)["tokens"] for line in (runs.folder / "one" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(tokens)) == sorted(set(whole)), "the tokens of all ranks, without padding"
