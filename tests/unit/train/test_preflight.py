"""What is made of the ranks' facts: who differs, what is worth a remark, and the table."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from moe_scale.errors import Problem
from moe_scale.parallel.bandwidth import GroupRate
from moe_scale.train.preflight import HOSTS_SHOWN, Preflight, RankFacts, _differences

GIB = 2**30


def cluster(num_hosts: int, per_host: int = 2) -> list[RankFacts]:
    same = {"python": "3.12.1", "torch": "2.13.0", "triton": "none", "settings": "5e77"}
    code = {"code": "1a2b", "commit": "c0ffee"}
    return [
        RankFacts(
            rank=host * per_host + local,
            host=f"n{host + 1}",
            device="NVIDIA H100",
            same=same | (code if local == 0 else {}),
            device_free=70 * GIB - local,
            host_free=500 * GIB,
            clock_s=0.001 * host,
        )
        for host in range(num_hosts)
        for local in range(per_host)
    ]


def with_fact(ranks: list[RankFacts], rank: int, **same: str) -> None:
    ranks[rank] = replace(ranks[rank], same={**ranks[rank].same, **same})


def problems(ranks: list[RankFacts]) -> list[Problem]:
    return _differences([{"host": rank.host, "same": dict(rank.same)} for rank in ranks])


def shown(found: Preflight, **how: bool) -> str:
    console = Console(file=io.StringIO(), width=120)
    found.show(console, **how)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_ranks_that_agree_have_no_problems() -> None:
    assert problems(cluster(4)) == []


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        (
            "torch",
            "2.12.0",
            "hosts: torch: 2.13.0 on n1, rank 3 of n2, n3; 2.12.0 on rank 2 of n2; install the same version on all "
            "hosts",
        ),
        (
            "code",
            "9f9f",
            "hosts: code: 1a2b on n1, n3; 9f9f on n2; bring the same files to all hosts",
        ),
        ("commit", "deface", "hosts: commit: c0ffee on n1, n3; deface on n2; bring the same commit to all hosts"),
        (
            "triton",
            "3.7.1",
            "hosts: triton: none on n1, rank 3 of n2, n3; 3.7.1 on rank 2 of n2; install the same version on all hosts",
        ),
    ],
)
def test_who_differs_is_named(fact: str, value: str, message: str) -> None:
    ranks = cluster(3)
    with_fact(ranks, 2, **{fact: value})
    assert list(map(str, problems(ranks))) == [message]


def test_what_a_rank_does_not_know_is_no_difference() -> None:
    """No git on a host, or a host with code that knows other facts."""
    ranks = cluster(2, per_host=1)
    ranks[1] = replace(ranks[1], same={"python": "3.12.1", "torch": "2.12.0", "news": "of a later version"})
    assert [problem.where for problem in problems(ranks)] == ["hosts: torch"]


def test_every_fact_that_differs_is_told_at_once() -> None:
    ranks = cluster(2)
    with_fact(ranks, 2, torch="2.12.0", python="3.11.2", settings="0000")
    assert [problem.where for problem in problems(ranks)] == ["hosts: python", "hosts: torch", "hosts: settings"]


def test_of_many_hosts_a_few_are_named() -> None:
    ranks = cluster(100, per_host=1)
    with_fact(ranks, 99, torch="2.12.0")
    (problem,) = problems(ranks)
    assert problem.what == "2.13.0 on n1, n2, n3, n4, n5, n6, n7, n8 and 91 more; 2.12.0 on n100"


def test_the_table_has_a_line_a_host() -> None:
    table = shown(
        Preflight(cluster(2), [GroupRate("world", 4, 1, 12.5e9, 6.25e9), GroupRate("expert", 2, 2, 3e9, 1e9)])
    )
    lines = [line.split() for line in table.splitlines()]
    assert ["n2", "2-3", "NVIDIA", "H100", "70.0", "GiB", "500.0", "GiB", "+0.001", "s"] in lines
    assert ["world", "4", "1", "12.50", "GB/s", "6.25", "GB/s"] in lines
    assert ["expert", "2", "2", "3.00", "GB/s", "1.00", "GB/s"] in lines
    assert "the same on all ranks: python 3.12.1, torch 2.13.0, settings 5e77, code 1a2b, commit c0ffee" in table


def test_a_run_on_many_hosts_shows_some_and_the_doctor_all() -> None:
    found = Preflight(cluster(HOSTS_SHOWN + 4, per_host=1), [])
    assert "and 4 more hosts: moe-scale doctor shows all" in shown(found)
    assert f"n{HOSTS_SHOWN + 4} " not in shown(found)
    assert f"n{HOSTS_SHOWN + 4} " in shown(found, all_hosts=True)


def test_remarks_on_clocks_and_on_devices_that_differ() -> None:
    ranks = cluster(3, per_host=1)
    assert Preflight(ranks, []).remarks() == []
    ranks[1] = replace(ranks[1], clock_s=-4.04)
    ranks[2] = replace(ranks[2], device="NVIDIA A100")
    assert Preflight(ranks, []).remarks() == [
        "the devices differ, and the slowest sets the pace: NVIDIA H100 on n1, n2; NVIDIA A100 on n3",
        "the clock of n2 is 4.0 s behind that of rank 0's host",
    ]


def test_the_record_has_an_entry_a_host() -> None:
    record = Preflight(cluster(2), [GroupRate("world", 4, 1, 12.5e9, 6.25e9)]).record()
    assert [(host["host"], host["ranks"]) for host in record["hosts"]] == [("n1", "0-1"), ("n2", "2-3")]
    assert record["groups"] == [
        {"name": "world", "size": 4, "count": 1, "all_reduce": 12.5e9, "all_to_all": 6.25e9},
    ]
