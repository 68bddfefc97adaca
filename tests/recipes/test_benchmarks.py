"""The studies of ``benchmarks/`` run, tiny: what they are started with, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run_study(script: str, folder: Path, *tiny: str) -> str:
    """Run it. Returns what it printed."""
    command = [sys.executable, f"benchmarks/{script}", "--output_dir", str(folder), *tiny]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_study_of_long_training(tmp_path: Path) -> None:
    """Two of its runs on each text: the record holds their curves, the table their best and last scores."""
    tiny = ("--kilobytes", "6", "--max_steps", "4", "--variants", "switch", "dense")
    printed = run_study("degradation.py", tmp_path / "study", *tiny)
    record = json.loads((tmp_path / "study" / "degradation.json").read_text())
    assert record["texts"]["plain"]["bytes"] <= 6000 < 18_000 < record["texts"]["plain-more"]["bytes"] <= 24_000
    for data in ("plain", "skewed"):
        runs = record["runs"][data]
        assert list(runs) == ["switch", "dense"]
        assert [step for step, _ in runs["switch"]["eval/loss"]] == [1, 2, 3, 4]
        assert "router/load_max" in runs["switch"]
        assert "router/load_max" not in runs["dense"]
        best = min(loss for _, loss in runs["switch"]["eval/loss"])
        last = runs["switch"]["eval/loss"][-1][1]
        table = printed.split(f"\n{data}\n")[1].splitlines()
        row = next(line for line in table if line.startswith("| switch |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert (cells[1], cells[3]) == (f"{best:.3f}", f"{last:.3f}")
        assert (tmp_path / "study" / f"degradation_{data}.png").stat().st_size > 20_000


@pytest.mark.long
def test_the_study_of_upcycling(tmp_path: Path) -> None:
    """Two seeds: what goes on begins where the dense model of its seed ended, and the table holds means over both."""
    folder = tmp_path / "study"
    tiny = ("--steps", "22", "21", "--seeds", "2")
    printed = run_study("upcycling.py", folder, *tiny)
    seeds = json.loads((folder / "upcycling.json").read_text())
    assert len(seeds) == 2
    for found in seeds:
        before, on = found.pop("before"), {name: figures["first_loss"] for name, figures in found.items()}
        drawn = on.pop("drawn, 8 experts, 2 a token")
        assert len(on) == 4
        assert max(on.values()) - min(on.values()) < 0.01, "one function, in bf16 where this machine has it"
        assert max(on.values()) < min(before["first_loss"], drawn) - 0.5, "what begins anew"
    assert seeds[0]["dense"]["heldout"] != seeds[1]["dense"]["heldout"], "another seed"
    row = next(line for line in printed.splitlines() if line.startswith("| 8 copies, 2 a token |"))
    losses = [list(found["8 copies, 2 a token"]["heldout"].values())[-1] for found in seeds]
    spread = abs(losses[0] - losses[1]) / 2**0.5
    assert row.split(" | ")[2] == f"{sum(losses) / 2:.4f} ± {spread:.4f}"
    assert (folder / "upcycling.png").stat().st_size > 20_000
    assert run_study("upcycling.py", folder, *tiny).endswith(printed[printed.index("|") :]), "all is there already"
