"""``switch`` spread over ranks: one curve in every layout and of both objectives, and an exact resume.

Which tokens are dropped depends on a rank's micro-batch, so curves of several ranks have as many sequences in each of
their micro-batches, and the same ones, as those of one rank.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.curves import STEPS, Curve, SwitchRuns, assert_same

SPANS = ("--model.objective", "span_corruption")
DEEPSPEED = ("--moe.backend", "deepspeed")
MUST = ("--resume", "must")
ONE_RANK = {
    "one": (0, ()),
    "zero3": (3, ()),
    "deepspeed": (3, DEEPSPEED),
    "spans": (0, SPANS),
    "spans-zero3": (3, SPANS),
    "spans-deepspeed": (3, (*SPANS, *DEEPSPEED)),
}
TWO_RANKS = {
    "two-ep2": (3, ("--moe.ep_size", "2")),
    "two-deepspeed": (3, (*DEEPSPEED, "--moe.ep_size", "2")),
    "two-spans": (3, (*SPANS, "--moe.ep_size", "2")),
    "two-zero2": (2, ()),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SwitchRuns:
    return SwitchRuns(tmp_path_factory.mktemp("runs"))


def weight_norms(runs: SwitchRuns, name: str) -> dict[str, object]:
    """Those of the weights at the end."""
    last = json.loads((runs.folder / name / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in last.items() if key.startswith("weight_norm/")}


@pytest.fixture(scope="module")
def one_rank(runs: SwitchRuns) -> dict[str, Curve]:
    cases = {name: runs.argv(name, 1, stage=stage, extra=flags) for name, (stage, flags) in ONE_RANK.items()}
    # Half a run, continued at once, and another, to be continued on two ranks.
    half = (*SPANS, "--max_steps", "9", "--model.dropout", "0.1")
    cases["begun"] = runs.argv("stayed", 1, stage=3, extra=half)
    cases["stayed"] = runs.argv("stayed", 1, stage=3, extra=(*SPANS, *MUST, "--model.dropout", "0.1"))
    cases["whole"] = runs.argv("whole", 1, stage=3, extra=(*SPANS, "--model.dropout", "0.1"))
    cases["moved"] = runs.argv("moved", 1, stage=3, extra=("--max_steps", "9"))
    runs.run(1, cases)
    return {name: runs.curve(name) for name in (*ONE_RANK, "stayed", "whole")}


def test_both_backends_give_one_curve(one_rank: dict[str, Curve]) -> None:
    for first in ("one", "spans"):
        curve = one_rank[first]
        assert len(curve) == STEPS
        assert curve[-1][0] < curve[0][0]
        assert_same({name: one_rank[name] for name in ONE_RANK if ("spans" in name) == ("spans" in first)}, curve)


def test_resuming_is_exact(one_rank: dict[str, Curve]) -> None:
    assert one_rank["stayed"] == one_rank["whole"]


@pytest.mark.timeout(600)
def test_two_ranks_give_the_curve_of_one(runs: SwitchRuns, one_rank: dict[str, Curve]) -> None:
    """And a run goes on on two ranks with another backend."""
    cases = {name: runs.argv(name, 2, stage=stage, extra=flags) for name, (stage, flags) in TWO_RANKS.items()}
    moved = runs.argv("moved", 2, stage=3, extra=(*MUST, *DEEPSPEED, "--moe.ep_size", "2"))
    found = runs.train(2, cases | {"moved": moved})
    assert_same({"two-spans": found.pop("two-spans")}, one_rank["spans"])
    assert_same(found, one_rank["one"])
    expected = weight_norms(runs, "one")
    assert {"weight_norm/experts", "weight_norm/router", "weight_norm/attention"} <= expected.keys()
    for name in (*ONE_RANK, *TWO_RANKS):
        if "spans" not in name:
            for part, norm in weight_norms(runs, name).items():
                np.testing.assert_allclose(norm, expected[part], rtol=1e-4, err_msg=f"{part} of {name}")
