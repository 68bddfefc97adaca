"""Two real ranks compare what they are about to run, and measure their links."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.curves import Runs
from tests.ranks import REPO, run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what came of each case."""
    runs = Runs(tmp_path_factory.mktemp("preflight"))
    result = runs.folder / "result.json"
    worker = str(REPO / "tests" / "distributed" / "preflight_cases.py")
    run_ranks(2, [worker, str(result), *runs.argv("run", 2, stage=3, extra=("--moe.ep_size", "2"))], timeout=120)
    return json.loads(result.read_text())


def test_ranks_that_agree_get_a_table(outcomes: list[dict[str, Any]]) -> None:
    first, second = (outcome["same"] for outcome in outcomes)
    assert first["record"] == second["record"], "every rank knows the same"
    assert second["printed"] == "", "and one tells"
    assert [host["host"] for host in first["record"]["hosts"]] == ["host0", "host1"]
    assert first["record"]["same"]["data"] == "0123456789ab"
    groups = {group["name"]: group for group in first["record"]["groups"]}
    assert {name: (group["size"], group["count"]) for name, group in groups.items()} == {
        "world": (2, 1),
        "expert": (2, 1),
    }
    assert all(group[kind] > 1e6 for group in groups.values() for kind in ("all_reduce", "all_to_all"))
    assert "host1" in first["printed"]
    assert "gloo" in first["printed"]
    assert abs(first["record"]["hosts"][1]["clock_s"]) < 0.5, "it is one clock"


REMEDIES = {
    "settings": "start all ranks with the same command and files",
    "package": "install the same version on all hosts",
    "code": "bring the same files to all hosts",
    "data": "give all hosts the same files",
}


@pytest.mark.parametrize(
    ("case", "found"),
    [
        (
            "settings",
            [
                "hosts: optim.lr: 0.003 on host0; 0.5 on host1",
                "hosts: deepspeed_config: gradient_clipping: 0.5 on host0; 0.25 on host1",
            ],
        ),
        ("package", ["hosts: torch: {torch} on host0; 2.12.0 on host1"]),
        ("code", ["hosts: code: {code} on host0; deface on host1"]),
        ("data", ["hosts: data: 000000000000 on host0; 111111111111 on host1"]),
    ],
)
def test_a_difference_stops_all_ranks_and_names_the_hosts(
    outcomes: list[dict[str, Any]], case: str, found: list[str]
) -> None:
    same = outcomes[0]["same"]["record"]["same"]
    expected = [f"{problem.format(**same)}; {REMEDIES[case]}" for problem in found]
    told = outcomes[0][case]["problems"]
    assert outcomes[1][case]["problems"] == told
    assert [problem for problem in told if "deepspeed_override" not in problem] == expected
