"""``moe-scale sweep --reach``: what trials need to be as good as a variant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_scale import cli
from moe_scale.errors import ConfigError
from moe_scale.tools import sweep_plan, sweep_report
from moe_scale.tools.sweep_plan import Plan
from moe_scale.tools.sweep_reach import check_reference
from moe_scale.tools.sweep_trials import Space, make_trials
from moe_scale.train.finished import Mark, write_mark
from tests.unit.tools.test_sweep import a_plan


def write_scores(folder: Path, name: str, scores: dict[int, float | None], flops_a_token: float) -> None:
    """A run of 10 tokens and a second a step."""
    run = folder / "trials" / name
    run.mkdir(parents=True)
    lines = []
    for step, score in scores.items():
        base = {"step": step, "tokens": 10 * step, "flops": 10 * step * flops_a_token}
        lines += [{**base, "tokens_per_s": 10.0}, {**base, "eval/loss": score, "eval/bleu": score}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = max(scores)
    write_mark(run, Mark(last, False, {"eval/loss": scores[last], "eval/bleu": scores[last]}))


@pytest.fixture
def swept(tmp_path: Path) -> tuple[Plan, Path]:
    """Three variants with two seeds; `late` never gets there with the second."""
    variants: dict[str, dict[str, str]] = {"dense": {}, "moe": {"a": "1"}, "late": {"a": "2"}}
    trials = make_trials(Space({}, variants=variants, seeds=(0, 1)))
    curves: dict[tuple[str, str], dict[int, float | None]] = {
        ("dense", "0"): {10: 3.0, 20: 2.0, 40: 2.5},
        ("dense", "1"): {10: 3.0, 20: 2.2, 40: 1.0},
        ("moe", "0"): {10: 2.0, 20: None, 40: 1.5},
        ("moe", "1"): {10: 2.0, 20: 1.0, 40: 1.4},
        ("late", "0"): {10: 9.0, 20: 3.0, 40: 1.9},
        ("late", "1"): {10: 9.0, 20: 3.0, 40: 1.1},
    }
    flops = {"dense": 6.0, "moe": 3.0, "late": 6.0}
    for trial in trials:
        write_scores(tmp_path, trial.name, curves[trial.variant, trial.settings["seed"]], flops[trial.variant])
    plan = a_plan(trials, ["variant"], arguments={"recipe": "r.py", "settings": []})
    sweep_plan.write_plan(plan, tmp_path)
    return plan, tmp_path


def test_costs_until_a_trial_is_as_good_as_the_reference_with_its_seed(swept: tuple[Plan, Path]) -> None:
    plan, folder = swept
    found = sweep_report.make_report(plan, folder, "dense").reached
    by_name = {(one.label, one.mark): one for one in found}
    moe, moe_1 = by_name["moe", 2.0], by_name["moe", 1.0]
    assert (moe.step, moe.costs) == (10, {"tokens": 100, "flops": 300.0, "seconds": 10.0})
    assert moe.ratios == {"tokens": 0.5, "flops": 0.25, "seconds": 0.5}
    assert (moe_1.step, moe_1.ratios["flops"]) == (20, 0.25)
    dense = by_name["dense", 2.0]
    assert (dense.step, dense.ratios["flops"]) == (20, 1.0), "its own best, and not its last evaluation"
    late, never = by_name["late", 2.0], by_name["late", 1.0]
    assert (late.step, late.ratios["flops"]) == (40, 2.0)
    assert (never.step, never.best, never.costs, never.ratios) == (None, 1.1, {}, {})


def test_a_score_that_is_better_when_higher(swept: tuple[Plan, Path]) -> None:
    plan, folder = swept
    found = sweep_report.make_report(Plan(**{**vars(plan), "metric": "eval/bleu"}), folder, "dense").reached
    assert {one.mark for one in found} == {3.0}
    assert {one.label: one.step for one in found} == {"dense": 10, "moe": None, "late": 10}


def test_the_table_and_the_files(swept: tuple[Plan, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = swept
    cli.main(["sweep", "r.py", "--output_dir", str(folder), "--report_only", "--reach", "dense"])
    assert "What it takes" in capsys.readouterr().out
    text = (folder / "sweep.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| late | 2 | 1 |")]
    assert "2.00" in line
    (line,) = [line for line in text.splitlines() if line.startswith("| moe | 2 | 2 |")]
    assert "0.25 (0.25 to 0.25) | 0.50 (0.50 to 0.50)" in line
    record = json.loads((folder / "results.json").read_text())["reached"]
    assert record["reference"] == "dense"
    assert len(record["trials"]) == 6


def test_a_reference_is_one_of_the_variants(swept: tuple[Plan, Path]) -> None:
    plan, _ = swept
    with pytest.raises(ConfigError, match="choose one of dense, moe, late"):
        check_reference(plan, "sparse")
    alone = a_plan(make_trials(Space({"moe.top_k": ("1", "2")})), ["moe.top_k"])
    with pytest.raises(ConfigError, match="without variants"):
        check_reference(alone, "dense")
