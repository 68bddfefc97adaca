"""Three ranks without a launcher, one of which goes wrong: who says what, and that nobody stays behind."""

from __future__ import annotations

import re
import time

import pytest

from tests.ranks import Ended, Ranks

pytestmark = pytest.mark.slow
WORKER = ["-m", "tests.unit.parallel.watched_rank"]


def end_of(fault: str, rank: int) -> Ended:
    with Ranks(3, [*WORKER, fault, str(rank)]) as ranks:
        return ranks.wait(timeout=60)


def errors(ended: Ended) -> list[str]:
    return [line for text in ended.output for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_killed_is_named_by_one_line(rank: int) -> None:
    """And the others leave, even where their last words fail or never end."""
    ended = end_of("killed", rank)
    assert ended.codes == [-9 if n == rank else 1 for n in range(3)], ended
    (error,) = errors(ended)
    says = r"rank 0 is lost" if rank == 0 else r"lost rank 2 on \S+, process \d+, .* when last heard of: it died"
    assert re.search(says, error), ended
    assert "".join(ended.output).strip() == error, ended


@pytest.mark.parametrize(("fault", "rank"), [("busy", 2), ("late", 0), ("slow", 2)])
def test_no_false_alarm(fault: str, rank: int) -> None:
    """A rank that cannot report for many beats, that is still closing its files when the others are done, or that is
    longer in what may take for ever than others may stand still.
    """
    ended = end_of(fault, rank)
    assert ended.codes == [0, 0, 0], ended
    assert ended.output == ["the end\n"] * 3, ended


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_fails_shows_its_stack_and_ends_the_others(rank: int) -> None:
    ended = end_of("failed", rank)
    assert ended.codes == [1, 1, 1], ended
    for n, text in enumerate(ended.output):
        assert ("ValueError: a mistake of one rank" in text) == (n == rank or n == 0), ended
        assert ("Traceback" in text) == (n == rank), ended


def test_what_all_ranks_raise_is_raised_at_once() -> None:
    for fault, last in (("diverged", "DivergedError: on all ranks"), ("mistake", "ValueError: a mistake of all ranks")):
        ended = end_of(fault, 0)
        assert ended.codes == [1, 1, 1], ended
        for text in ended.output:
            assert text.strip().endswith(last), ended
        assert not errors(ended), ended


@pytest.mark.parametrize(("fault", "rank"), [("stuck", 2), ("frozen", 0)])
def test_a_rank_that_is_stuck_is_seen_in_a_list_of_all(fault: str, rank: int) -> None:
    with Ranks(3, [*WORKER, fault, str(rank)]) as ranks:
        start = time.monotonic()
        while time.monotonic() - start < 60 and sum(p.poll() is not None for p in ranks.processes) < 2:
            time.sleep(0.1)
        ended = ranks.wait(timeout=5)
    assert [code for n, code in enumerate(ended.codes) if n != rank] == [1, 1], ended
    (error,) = errors(ended)
    if (fault, rank) == ("frozen", 0):
        assert error.endswith("rank 0 does not say a word"), ended
        return
    where = re.findall(r"^  rank (\d) on \S+, process \d+, step (\d): forward, for \d+ s$", ended.output[0], re.M)
    assert [number for number, _ in where] == ["0", "1", "2"], ended
    assert [step for number, step in where if number != str(rank)] == ["3", "3"], ended
