"""Runs with faults, many in one start of two ranks: the side of the tests. ``fault_cases.py`` is that of the ranks."""

from __future__ import annotations

import json
from typing import Any

from tests.curves import Runs
from tests.ranks import REPO, run_ranks

WORKER = str(REPO / "tests" / "distributed" / "fault_cases.py")

Case = dict[str, Any]


def case(argv: list[str], *faults: dict[str, Any]) -> Case:
    return {"argv": argv, "faults": list(faults)}


def run_cases(
    runs: Runs, cases: dict[str, Case], name: str, timeout: float = 280.0
) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Train the cases in one start of two ranks. For each, how it ended on each rank; and what rank 0 printed."""
    assert len(cases) > 1, "a single case ends the ranks as a recipe does"
    listed = runs.folder / f"{name}.json"
    listed.write_text(json.dumps(list(cases.values())))
    printed = run_ranks(2, [WORKER, str(listed)], timeout=timeout)
    ends = [json.loads(listed.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]
    return {name: list(both) for name, both in zip(cases, zip(*ends, strict=True), strict=True)}, printed
