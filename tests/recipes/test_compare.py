"""``moe-scale compare``: the variants' curves, held against each other on two ranks, and what is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_scale.errors import ConfigError
from moe_scale.tools import compare
from tests.ranks import REPO, run_ranks

RECIPE = str(REPO / "recipes" / "lm_16l.py")


def test_backends_side_by_side_on_two_ranks(tiny_flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "compare"
    printed = run_ranks(
        2, [str(REPO / "recipes" / "compare_moe.py"), *tiny_flags, "--moe.ep_size", "2", "--output_dir", str(out)]
    )
    rows = {row["variant"]: row for row in json.loads((out / "compare.json").read_text())}
    assert list(rows) == ["custom", "deepspeed", "autoep", "dense"]
    for name in ("deepspeed", "autoep"):
        assert rows[name]["largest_difference"] < 1e-5
        assert rows[name]["all_to_all_bytes_per_step"] > 0
    assert rows["custom"]["largest_difference"] is None, "it is what the others are compared with"
    # Rows of 32 fp32 values to one other rank: two trips in the forward pass of training and two in the backward one.
    assert rows["custom"]["all_to_all_bytes_per_step"] == pytest.approx(
        rows["autoep"]["all_to_all_bytes_per_step"], rel=0.01
    )
    assert rows["dense"]["all_to_all_bytes_per_step"] == 0
    assert abs(rows["dense"]["loss"] - rows["custom"]["loss"]) > 1e-3, "another model has another curve"
    assert "largest loss difference" in (out / "compare.md").read_text()
    assert (out / "compare.png").stat().st_size > 5000
    assert "Traceback" not in printed


def test_problems_of_all_variants_come_before_any_training(tiny_flags: list[str], tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    out = tmp_path / "compare"
    arguments = parser.parse_args([RECIPE, "--output_dir", str(out)])
    with pytest.raises(ConfigError) as refused:
        compare.run(arguments, [*tiny_flags, "--moe.router", "sigmoid", "--moe.top_k", "9"])
    found = [str(problem) for problem in refused.value.problems]
    assert sum("moe.backend = deepspeed" in line for line in found) == 1
    assert sum("moe.backend = autoep" in line for line in found) == 1
    assert sum(line.startswith("moe.top_k") for line in found) == 1, "what is wrong for all is said once"
    assert not out.exists()


@pytest.mark.parametrize("path", ["nowhere.py", "recipes", "tests/ranks.py"])
def test_a_file_without_a_recipe_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        compare.load_recipe(REPO / path)
