"""Signs that a run is getting worse: each is told once, and not of a run that is well."""

from __future__ import annotations

import json

import pytest

from moe_scale.config import FaultConfig
from moe_scale.train.signs import CollapseWatch, OverfittingWatch, RouterWatch


def record(step: int, *layers: list[int]) -> dict:
    return {"step": step, "router/tokens_per_expert": list(layers)}


def test_a_collapsed_layer_is_warned_of_once() -> None:
    watch = CollapseWatch(FaultConfig(collapse_share=0.75, collapse_steps=100), [1, 3], top_k=2)
    even, collapsed = [25, 25, 25, 25], [5, 50, 25, 20]
    assert watch.look(record(1, even, collapsed)) == []
    assert watch.look(record(100, even, collapsed)) == []
    (warning,) = watch.look(record(101, even, collapsed))
    assert warning.startswith("warning: expert 1 of layer 3 has taken 100% of the tokens, for 100 steps now")
    assert watch.look(record(301, even, collapsed)) == []
    assert watch.look(record(400, collapsed, collapsed)) == []
    assert watch.look(record(450, even, collapsed)) == [], "it recovered in between"
    assert watch.look(record(501, collapsed, collapsed)) == []
    assert len(watch.look(record(601, collapsed, collapsed))) == 1


@pytest.mark.parametrize("counts", [[50, 50], [0, 0], [100, 0]])
def test_where_every_expert_gets_most_tokens_nothing_can_collapse(counts: list[int]) -> None:
    watch = CollapseWatch(FaultConfig(collapse_steps=1), [0], top_k=2)
    assert [watch.look(record(step, counts)) for step in (1, 50, 100)] == [[], [], []]


def test_a_dense_model_has_nothing_to_look_at() -> None:
    assert CollapseWatch(FaultConfig(), [], top_k=2).look({"step": 1}) == []
    assert RouterWatch(FaultConfig(), []).look({"step": 1}) == []


def router(step: int, dropped: float = 0.0, entropy: float = 0.5, logit_rms: float = 1.0, experts: int = 4) -> dict:
    """A record of two layers, the second of which is as told."""
    return {
        "step": step,
        "router/dropped": [0.0, dropped],
        "router/entropy": [0.5, entropy],
        "router/logit_rms": [1.0, logit_rms],
        "router/tokens_per_expert": [[10] * 4, [10] * experts],
    }


def test_dropping_for_long_is_warned_of_once() -> None:
    watch = RouterWatch(FaultConfig(dropped_share=0.2, collapse_steps=50), [1, 3])
    steps = [(1, 0.3), (50, 0.3), (60, 0.1), (70, 0.3), (119, 0.3)]
    assert [watch.look(router(step, dropped=dropped)) for step, dropped in steps] == [[]] * 5
    (warning,) = watch.look(router(120, dropped=0.25))
    assert warning.startswith("warning: the experts of layer 3 turn 25% of their tokens away")
    assert "--moe.capacity_factor" in warning
    assert watch.look(router(500, dropped=0.25)) == []


def test_a_certain_router_is_warned_of_once() -> None:
    watch = RouterWatch(FaultConfig(certain_entropy=0.02, collapse_steps=50), [1, 3])
    assert watch.look(router(1, entropy=0.01, logit_rms=30.0)) == []
    (warning,) = watch.look(router(51, entropy=0.01, logit_rms=30.0))
    assert warning.startswith("warning: the router of layer 3 is certain of nearly every token")
    assert "scores of 30.0" in warning
    assert watch.look(router(151, entropy=0.0, logit_rms=30.0)) == []


@pytest.mark.parametrize("known", [{"logit_rms": 0.0}, {"experts": 1, "logit_rms": 5.0}])
def test_a_router_without_a_choice_is_not_certain(known: dict) -> None:
    watch = RouterWatch(FaultConfig(collapse_steps=1), [0, 1])
    assert [watch.look(router(step, entropy=0.0, **known)) for step in (1, 100)] == [[], []]


def evaluations(watch: OverfittingWatch, *losses: tuple[float, float]) -> list[list[str]]:
    """What the watch says after each evaluation of (training loss before it, held-out loss)."""
    said = []
    for number, (training, heldout) in enumerate(losses, start=1):
        watch.trained(training)
        said.append(watch.evaluated(heldout, 10 * number))
    return said


def test_overfitting_is_warned_of_once() -> None:
    watch = OverfittingWatch(FaultConfig(overfit_evaluations=2))
    said = evaluations(watch, (3.0, 3.1), (2.0, 2.9), (1.5, 3.0), (1.0, 3.2), (0.9, 3.4), (0.8, 3.6))
    assert [len(s) for s in said] == [0, 0, 0, 1, 0, 0]
    assert "the held-out loss was 2.9000 at step 20 and is 3.2000" in said[3][0]
    assert "the training loss fell from 2.0000 to 1.0000" in said[3][0]


@pytest.mark.parametrize("saved_after", range(1, 6))
def test_a_run_that_goes_on_warns_of_overfitting_where_the_whole_one_does(saved_after: int) -> None:
    losses = [(3.0, 3.1), (2.0, 2.9), (1.5, 3.0), (1.0, 3.2), (0.9, 3.4), (0.8, 3.6)]
    config, said = FaultConfig(overfit_evaluations=2), []
    watch = OverfittingWatch(config)
    for number, (training, heldout) in enumerate(losses, start=1):
        watch.trained(training + 0.1)
        if number == saved_after:  # between two steps that are logged
            watch = OverfittingWatch(config, json.loads(json.dumps(watch.state())))
        watch.trained(training - 0.1)
        said.append(watch.evaluated(heldout, 10 * number))
    assert [len(s) for s in said] == [0, 0, 0, 1, 0, 0]
    assert "the held-out loss was 2.9000 at step 20 and is 3.2000" in said[3][0]
    assert "the training loss fell from 2.0000 to 1.0000" in said[3][0]


@pytest.mark.parametrize(
    "losses",
    [
        [(3.0, 3.1), (2.0, 3.2), (1.5, 3.0), (1.0, 3.05), (0.9, 2.9)],  # never twice in a row
        [(3.0, 3.1), (3.1, 3.2), (3.2, 3.3), (3.3, 3.4)],  # training gets worse as well: something else is wrong
    ],
)
def test_what_is_no_overfitting(losses: list[tuple[float, float]]) -> None:
    assert not any(evaluations(OverfittingWatch(FaultConfig(overfit_evaluations=2)), *losses))


def test_the_warning_can_be_switched_off() -> None:
    watch = OverfittingWatch(FaultConfig(overfit_evaluations=0))
    assert not any(evaluations(watch, *[(1.0 / n, float(n)) for n in range(1, 9)]))
    assert watch.evaluated(1.0, 100) == [], "a run that resumes may evaluate before it trains"


def test_experts_that_choose_leave_tokens_to_others() -> None:
    watch = RouterWatch(FaultConfig(dropped_share=0.2, collapse_steps=10), [1, 3], "expert_choice")
    assert [watch.look(router(step, dropped=0.5)) for step in (1, 20, 40)] == [[], [], []]


def test_a_loss_that_is_no_number_is_not_the_best() -> None:
    watch = OverfittingWatch(FaultConfig(overfit_evaluations=2))
    said = evaluations(watch, (3.0, float("nan")), (2.0, 2.9), (1.5, 3.0), (1.0, 3.2))
    assert [len(s) for s in said] == [0, 0, 0, 1]


def test_a_step_without_a_loss_is_not_in_the_mean() -> None:
    watch = OverfittingWatch(FaultConfig(overfit_evaluations=2))
    watch.trained(float("nan"))
    said = evaluations(watch, (3.0, 3.1), (2.0, 3.2), (1.5, 3.3))
    assert [len(s) for s in said] == [0, 0, 1]
