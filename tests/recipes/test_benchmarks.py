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


@pytest.mark.long
def test_the_study_of_long_training(tmp_path: Path) -> None:
    """Two of its runs on each text: the record holds their curves, the table their best and last scores."""
    command = [sys.executable, "benchmarks/degradation.py", "--output_dir", str(tmp_path / "study")]
    tiny = ["--kilobytes", "6", "--max_steps", "4", "--variants", "switch", "dense"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([*command, *tiny], cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
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
        table = done.stdout.split(f"\n{data}\n")[1].splitlines()
        row = next(line for line in table if line.startswith("| switch |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert (cells[1], cells[3]) == (f"{best:.3f}", f"{last:.3f}")
        assert (tmp_path / "study" / f"degradation_{data}.png").stat().st_size > 20_000
