"""When a run stops, warns and goes back: the watches alone, without a run."""

from __future__ import annotations

import pytest

from moe_scale.config import FaultConfig
from moe_scale.errors import DivergedError
from moe_scale.train import faults
from moe_scale.train.faults import BadSteps, Deadline, SpikeWatch


class Clock:
    """Stands in for ``time`` in the module under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(faults.time, "monotonic", lambda: self.now)

    def steps(self, deadline: Deadline, seconds: float, save_s: float = 0.0) -> int:
        """Steps of so many seconds until the deadline is near."""
        for step in range(1, 10_000):
            self.now += seconds
            if deadline.near(save_s):
                return step
        raise AssertionError("the deadline never came")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_without_a_time_limit_no_deadline_is_near(clock: Clock) -> None:
    deadline = Deadline(None)
    clock.now += 1e9
    assert not deadline.near(1e9)


def test_a_run_stops_two_steps_and_two_saves_before_its_time_is_up(clock: Clock) -> None:
    assert clock.steps(Deadline(100.0), seconds=1.0) == 98
    assert clock.steps(Deadline(100.0), seconds=1.0, save_s=10.0) == 78


def test_a_slow_step_counts_for_those_that_follow(clock: Clock) -> None:
    deadline = Deadline(100.0)
    assert not deadline.near(0.0)
    clock.now += 20.0  # one with an evaluation, say
    assert not deadline.near(0.0)
    assert clock.steps(deadline, seconds=1.0) == 40, "time is left for two more like it"


def test_a_long_start_is_not_taken_for_a_step(clock: Clock) -> None:
    deadline = Deadline(100.0)
    clock.now += 60.0
    assert not deadline.near(0.0)
    assert clock.steps(deadline, seconds=1.0) == 38


def test_bad_steps_in_a_row_end_a_run() -> None:
    watch = BadSteps(FaultConfig(max_bad_steps=3))
    for step in (1, 2, 4, 5):
        if step == 4:
            watch.good()
        told = watch.bad(step, "the loss is not a number")
        assert told == f"warning: step {step} was skipped: the loss is not a number"
        watch.end_if_too_many()
    watch.bad(6, "the loss is not a number")
    with pytest.raises(DivergedError, match=r"^the loss is not a number at step 6; steps skipped in a row: 3 \(.*"):
        watch.end_if_too_many()


def test_a_spike_is_far_above_the_mean_of_the_last_50_steps() -> None:
    watch = SpikeWatch(FaultConfig(spike_factor=2.0))
    assert not any(watch.is_spike(loss) for loss in [100.0, *[5.0] * 8]), "too few to compare with"
    assert not any(watch.is_spike(5.0) for _ in range(50))
    assert not watch.is_spike(10.0)
    assert watch.is_spike(10.3)
    assert watch.is_spike(10.3), "a spike does not join what is compared with"
    assert watch.is_spike(float("inf"))
    assert not watch.is_spike(float("nan")), "a matter of bad steps"


def test_too_many_spikes_end_a_run() -> None:
    watch = SpikeWatch(FaultConfig(spike_factor=2.0, max_rollbacks=2))
    watch.rolled_back(10)
    watch.rolled_back(20)
    with pytest.raises(DivergedError, match="spiked at step 30, after 2 returns to a checkpoint"):
        watch.rolled_back(30)
