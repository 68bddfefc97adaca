"""What ``classifier`` reaches: three quarters of unseen sentences, order that is learned, and a control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import REPO, run_ranks

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
SEQUENCES = ["--data.max_len", "32", "--model.output_size", "4", "--model.input_size", "32"]


def scores_of(folder: Path, *flags: str) -> dict[str, Any]:
    """The test scores of a run at the recipe's own settings."""
    argv = [str(REPO / "recipes" / "classifier.py"), "--scale", "cpu", "--output_dir", str(folder / "run"), *flags]
    run_ranks(1, argv, timeout=3000)
    found: dict[str, Any] = json.loads((folder / "run" / "test_scores.json").read_text())
    return found


def test_sentences_that_nobody_has_seen(tmp_path: Path) -> None:
    found = scores_of(tmp_path)
    assert found["model"]["examples"] == 2112
    assert found["model"]["accuracy"] >= 0.75, found["baseline"]


def test_order_is_learned(tmp_path: Path) -> None:
    found = scores_of(tmp_path, "--data.source", "synthetic", *SEQUENCES)
    assert found["model"]["accuracy"] > 0.95
    assert found["baseline"]["accuracy"] < 0.45, "which patterns there are tells one of three"


def test_of_random_labels_nothing_is_learned(tmp_path: Path) -> None:
    found = scores_of(tmp_path, "--data.source", "synthetic-random-labels", *SEQUENCES)
    chance = found["chance"]
    assert abs(found["model"]["accuracy"] - chance["even"]) <= 3 * chance["standard_error"]
