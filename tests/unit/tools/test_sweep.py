"""``moe-scale sweep``: which trials there are, what is refused before any starts, what mattered, what is reported."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale import cli
from moe_scale.errors import ConfigError
from moe_scale.tools import sweep, sweep_plan, sweep_report, sweep_run
from moe_scale.tools.sweep_effects import Observation, main_effects, repeat_spread, spearman
from moe_scale.tools.sweep_plan import Plan, Planned
from moe_scale.tools.sweep_plot import MAX_LINES, colours_of, plot
from moe_scale.tools.sweep_trials import MAX_NAME, Space, Trial, make_trials, read_space, trial_name, value_of, words
from moe_scale.tools.sweep_wandb import trial_folder, trial_settings
from moe_scale.train.finished import Mark, write_mark
from tests.ranks import REPO

RECIPE = str(REPO / "recipes" / "lm_16l.py")
TINY = ["--max_steps=4", "--optim.warmup_steps=1", "--scale=cpu"]


def space(*texts: str, **more: Any) -> Space:
    """``--grid`` texts, and other attributes of a space."""
    read = read_space(texts, [], [])
    return Space(**{"grid": read.grid, **more})


# --- the trials ------------------------------------------------------------------------------------------------------


def test_grid_variants_and_repeats_are_combined() -> None:
    variants = {"moe": {}, "dense": {"moe.enabled": "false"}}
    trials = make_trials(space("moe.num_experts=2,4", "optim.lr=1e-3,1e-2", variants=variants, seeds=(7, 8)))
    found = [(t.variant, t.values["moe.num_experts"], t.values["optim.lr"], t.settings["seed"]) for t in trials]
    assert sorted(found) == sorted(itertools.product(("dense", "moe"), "24", ("1e-3", "1e-2"), "78"))
    assert [t.settings["seed"] for t in trials] == ["7"] * 8 + ["8"] * 8, "all settings once before any again"
    assert all((t.settings.get("moe.enabled") == "false") == (t.variant == "dense") for t in trials)
    assert trials[0].name == "moe_num_experts-2_lr-1e-3_seed-7"
    assert len({t.cell for t in trials}) == 8


def test_a_short_name_that_two_settings_share_is_written_in_full() -> None:
    (first, *_) = make_trials(space("data.seed=1,2", "other.seed=1,2", "moe.top_k=1"))
    assert first.name == "data.seed-1_other.seed-1_top_k-1"


def test_draws_stay_when_there_are_more_of_them() -> None:
    texts = [
        "optim.lr=log:1e-4:1e-2",
        "moe.top_k=int:1:3",
        "optim.beta1=uniform:0.8:0.95",
        "moe.router=choice:noisy,hash",
    ]
    draws = read_space([], texts, []).draws
    few = make_trials(Space({}, draws, trials=5, draw_seed=3))
    many = make_trials(Space({}, draws, trials=60, draw_seed=3))
    fewer_settings = make_trials(Space({}, draws[:1], trials=60, draw_seed=3))
    assert [t.values for t in many[:5]] == [t.values for t in few]
    assert [t.values["optim.lr"] for t in fewer_settings] == [t.values["optim.lr"] for t in many]
    assert [t.values for t in make_trials(Space({}, draws, trials=5, draw_seed=4))] != [t.values for t in few]
    rates = [float(t.values["optim.lr"]) for t in many]
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-2
    assert 15 < sum(rate < 1e-3 for rate in rates) < 45, "half of the decades have about half of the draws"
    assert {t.values["moe.top_k"] for t in many} == {"1", "2", "3"}
    assert all(0.8 <= float(t.values["optim.beta1"]) <= 0.95 for t in many)
    assert many[41].name.startswith("042_lr-")


def test_draws_differ_from_each_other_or_it_is_said() -> None:
    draws = read_space([], ["moe.top_k=int:1:3"], []).draws
    assert sorted(t.values["moe.top_k"] for t in make_trials(Space({}, draws, trials=3))) == ["1", "2", "3"]
    with pytest.raises(ConfigError, match="only 3 different draws"):
        make_trials(Space({}, draws, trials=4))


TEXT = st.text(min_size=1, max_size=40)
NAMES = st.lists(st.from_regex(r"[a-z]{1,4}(\.[a-z_]{1,6}){0,2}", fullmatch=True), min_size=1, max_size=4, unique=True)


@settings(deadline=None)
@given(NAMES, st.data())
def test_names_of_trials_are_different_and_safe(names: list[str], data: st.DataObject) -> None:
    values = {name: data.draw(st.lists(TEXT, min_size=1, max_size=3, unique=True)) for name in names}
    shown = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values.values())]
    taken: set[str] = set()
    found = [trial_name(one, taken) for one in shown]
    assert len({name.lower() for name in found}) == len(shown), "also where a file system sees no case"
    assert all(re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*", name) for name in found)
    assert max(map(len, found)) <= MAX_NAME


def test_a_folder_is_never_named_as_another_trials_log() -> None:
    variants = {"a": {}, "a.log": {"b": "1"}, "a.failed": {"b": "2"}}
    assert [trial.name for trial in make_trials(space(variants=variants))] == ["a", "a.log_", "a.failed_"]


def test_words_of_settings() -> None:
    given = {"moe.top_k": "-1", "data.path": "a b", "deepspeed_override": "zero_optimization.stage=1 x='y z'"}
    expected = ["--moe.top_k=-1", "--data.path=a b", "--deepspeed_override", "zero_optimization.stage=1", "x=y z"]
    assert words(given, {"deepspeed_override"}) == expected
    assert [value_of(text) for text in ("true", "False", "3", "1e-3", "nan", "cosine")] == [
        True, False, 3, 1e-3, "nan", "cosine",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "draws", "variants", "message"),
    [
        (["moe.top_k"], [], [], "--grid: 'moe.top_k'; write NAME=V1,V2"),
        (["moe.top_k=1,,2"], [], [], "--grid: 'moe.top_k=1,,2'"),
        (["a=1", "a=2"], [], [], "--grid: a is given twice"),
        (["a=0.1,1e-1"], [], [], "--grid: a has 0.1 and 1e-1 twice"),
        (["a=x,x"], [], [], "--grid: a has x twice"),
        ([], ["a=log:0:1"], [], "the logarithm needs LOW above 0"),
        ([], ["a=log:1:1"], [], "the smaller first"),
        ([], ["a=uniform:1"], [], "write uniform:LOW:HIGH"),
        ([], ["a=uniform:0:inf"], [], "write uniform:LOW:HIGH"),
        ([], ["a=int:1:2.5"], [], "whole numbers"),
        ([], ["a=normal:0:1"], [], "write NAME= and log:"),
        ([], ["a=choice:"], [], "write choice:a,b,c"),
        ([], ["a=int:1:2", "a=int:1:3"], [], "--draw: a is given twice"),
        ([], [], ["dense"], 'write "NAME: a=b c=d"'),
        ([], [], ["dense: moe.enabled"], 'write "NAME: a=b c=d"'),
        ([], [], ["dense: a='b"], "close the quotes"),
        ([], [], ["dense:", "dense: a=b"], "'dense' is given twice"),
    ],
)
def test_slips_in_what_varies_are_named(grid: list[str], draws: list[str], variants: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_space(grid, draws, variants)
    assert message in str(error.value)


def test_all_slips_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        read_space(["a"], ["b"], ["c"])
    assert [problem.where for problem in error.value.problems] == ["--grid", "--draw", "--variant"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "nothing varies"),
        ({"variants": {"moe": {}}}, "nothing varies"),
        ({"trials": 3, "seeds": (1, 2)}, "--trials: is a number of draws, and there are none"),
        ({"draws": read_space([], ["a=int:1:3"], []).draws}, "--trials: draws without a number of trials"),
        ({"grid": {"b": ("1",)}, "draws": read_space([], ["a=int:1:3"], []).draws, "trials": 2}, "both are given"),
        ({"grid": {"a": ("1",)}, "variants": {"x": {"a": "1"}, "y": {}}}, "'x' sets a, which the sweep varies"),
        ({"variants": {"x": {"seed": "1"}, "y": {}}, "seeds": (1, 2)}, "'x' sets seed"),
        ({"grid": {"seed": ("1", "2")}, "seeds": (1, 2)}, "--repeats: varies seed, as --grid"),
    ],
)
def test_what_cannot_be_combined(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_trials(Space(**{"grid": {}, **wrong}))
    assert message in str(error.value)


# --- what mattered ---------------------------------------------------------------------------------------------------


def observed(values: dict[tuple[str, ...], Sequence[float]], names: str = "ab") -> list[Observation]:
    return [Observation(dict(zip(names, key, strict=True)), v) for key, many in values.items() for v in many]


def test_main_effects_of_a_full_grid_by_hand() -> None:
    """2 x 3 with two repeats; sums of squares written out.

    Means of a: 4, 6; of b: 2, 5, 8; of all: 5. SS_a = 6 (1 + 1) = 12, SS_b = 4 (9 + 0 + 9) = 72. Each pair of repeats
    is 0.5 from its mean: SS_within = 6 * 2 * 0.25 = 3 with 6 degrees of freedom. No interaction: SS_total = 87.
    """
    means = {(a, b): 4 + 2 * int(a) - 3 + 3 * int(b) for a in "01" for b in "012"}
    found = main_effects(observed({key: (m - 0.5, m + 0.5) for key, m in means.items()}), ["a", "b"], drawn=False)
    b, a = found.effects
    assert (b.setting, a.setting) == ("b", "a")
    assert b.share == pytest.approx(72 / 87)
    assert a.share == pytest.approx(12 / 87)
    assert [(level.value, level.mean, level.count) for level in b.levels] == [("0", 2, 4), ("1", 5, 4), ("2", 8, 4)]
    assert (a.span, b.span) == (2, 6)
    assert found.repeat_spread == pytest.approx(np.sqrt(3 / 6))
    # F(1, 6) = 12 / 0.5 = 24, whose tail is 0.0027; F(2, 6) = 72: 0.00006.
    assert a.p == pytest.approx(0.0027, abs=0.0005)
    assert b.p is not None
    assert b.p < 0.0005
    assert a.verdict.startswith("clear")
    assert "repeats of the same settings: 6 degrees" in found.error
    assert found.remark == ""


def test_without_repeats_the_interactions_count_as_noise() -> None:
    """A checkerboard has no main effects: all of its variance is in the interaction."""
    values = {(a, b): [float((int(a) + int(b)) % 2)] for a in "0123" for b in "0123"}
    found = main_effects(observed(values), ["a", "b"], drawn=False)
    assert [effect.share for effect in found.effects] == pytest.approx([0, 0])
    assert all("not told from noise" in effect.verdict for effect in found.effects)
    assert found.repeat_spread is None
    assert "9 degrees of freedom" in found.error


def test_one_repeat_alone_is_no_measure_of_noise() -> None:
    values = {(a, b): [float(10 * int(a) + (int(a) * int(b)) % 3)] for a in "0123" for b in "0123"}
    values["0", "0"].append(0.001)
    found = main_effects(observed(values), ["a", "b"], drawn=False)
    assert found.repeat_spread == pytest.approx(0.001 / np.sqrt(2))
    assert "interactions included: 10 degrees" in found.error
    assert found.effects[0].verdict.startswith("clear")
    assert found.effects[1].verdict.startswith("not told from noise")


def test_a_trial_that_failed_does_not_make_an_effect_of_another_setting() -> None:
    """y = 10 b alone; (1, 1) is missing, so the plain means of a differ: 5 and 0."""
    values = {("0", "0"): [0.0, 0.1], ("0", "1"): [10.0, 10.1], ("1", "0"): [0.0, 0.1]}
    effects = {e.setting: e for e in main_effects(observed(values), ["a", "b"], drawn=False).effects}
    assert effects["a"].span == pytest.approx(5)
    assert effects["a"].share == pytest.approx(0, abs=1e-9)
    assert effects["b"].share is not None
    assert effects["b"].share > 0.6


def test_too_few_trials_are_said_to_be() -> None:
    found = main_effects(
        observed({(a, b): [float(int(a) + 5 * int(b))] for a in "01" for b in "01"}), ["a", "b"], drawn=False
    )
    assert {effect.verdict for effect in found.effects} == {"too few trials to tell"}
    assert found.remark.startswith("Too few trials")
    alone = main_effects(observed({("0",): [1.0], ("1",): [2.0]}, "a"), ["a"], drawn=False)
    assert alone.effects[0].p is None
    assert main_effects(observed({("0",): [1.0]}, "a"), ["a"], drawn=False).effects == ()
    assert main_effects([], ["a"], drawn=True).effects == ()


def test_a_metric_that_does_not_vary() -> None:
    found = main_effects(observed({(a,): [3.3, 3.3, 3.3] for a in "01"}, "a"), ["a"], drawn=False)
    assert found.effects[0].verdict == "the metric does not vary"


def test_noise_alone_is_called_clear_as_often_as_promised() -> None:
    draw = np.random.default_rng(1)
    clear = 0
    for _ in range(60):
        values = {(a, b): list(draw.normal(size=2)) for a in "01" for b in "01"}
        clear += sum(
            e.verdict.startswith("clear") for e in main_effects(observed(values), ["a", "b"], drawn=False).effects
        )
    assert clear <= 14, "120 tests at 5%: 6 expected, more than 14 in one of 1000"


def test_draws_are_ranked() -> None:
    draw = np.random.default_rng(0)
    rates, other = 10 ** draw.uniform(-4, -2, 40), draw.uniform(0, 1, 40)
    kinds = draw.choice(["x", "y"], 40)
    seen = [
        Observation({"lr": f"{lr:.4g}", "other": f"{o:.4g}", "kind": k}, float(np.log10(lr) + (k == "y")))
        for lr, o, k in zip(rates, other, kinds, strict=True)
    ]
    effects = {e.setting: e for e in main_effects(seen, ["lr", "other", "kind"], drawn=True).effects}
    assert effects["lr"].rank_correlation is not None
    assert effects["lr"].rank_correlation > 0.6
    assert effects["lr"].verdict.startswith("clear")
    assert sum(level.count for level in effects["lr"].levels) == 40
    assert len(effects["lr"].levels) == 5
    assert effects["kind"].verdict.startswith("clear")
    assert effects["kind"].rank_correlation is None
    assert effects["other"].verdict.startswith("not told from noise")
    assert effects["other"].by_chance == pytest.approx(4 / 39)
    few = main_effects(seen[:7], ["lr", "other", "kind"], drawn=True)
    assert {effect.verdict for effect in few.effects} == {"too few trials to tell"}
    assert "7 draws" in few.remark


def test_repeats_of_a_draw_count_once() -> None:
    seen = [Observation({"lr": str(n)}, n + noise) for n in range(4) for noise in (0.0, 0.2, 0.4)]
    found = main_effects(seen, ["lr"], drawn=True)
    assert found.repeat_spread == pytest.approx(0.2)
    assert found.effects[0].rank_correlation == pytest.approx(1)
    assert found.effects[0].p is None, "four draws, not twelve"
    assert repeat_spread(seen[::3]) is None


def test_variants_of_a_draw_are_no_draws_of_their_own() -> None:
    """What is drawn beside the one setting that counts must not look clear because each draw was trained four times."""
    draw = np.random.default_rng(2)
    clear = 0
    for _ in range(6):
        seen = []
        for _ in range(10):
            lr, other = draw.uniform(), draw.uniform()
            for place, variant in enumerate("abcd"):
                levels = {"variant": variant, "lr": f"{lr:.6g}", "other": f"{other:.6g}"}
                seen.append(Observation(levels, 10 * lr + 0.5 * place + 0.1 * draw.normal()))
        effects = {e.setting: e for e in main_effects(seen, ["variant", "lr", "other"], drawn=True).effects}
        clear += effects["other"].verdict.startswith("clear")
        assert effects["lr"].verdict.startswith("clear")
        assert effects["variant"].verdict.startswith("clear"), "small, but in each draw"
    assert clear <= 2, "6 tests at 5%: more than 2 in one of 400"
    few = main_effects(seen[: 4 * 7], ["variant", "lr", "other"], drawn=True)
    assert "7 draws" in few.remark


def test_spearman_with_ties() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5 over the root of 4.5 * 5.
    assert spearman([1, 5, 5, 9], [2, 3, 4, 8]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 2, 3], [9, 8, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


# --- what is reported ------------------------------------------------------------------------------------------------


def planned(trial: Trial, max_steps: int = 20) -> Planned:
    return Planned(trial, [], max_steps, 100.0, {"settings": {"moe": {"top_k": 2}}, "deepspeed": {}})


def a_plan(trials: list[Trial], factors: list[str], **more: Any) -> Plan:
    origin = {
        "started": "2026-01-01T00:00:00Z", "command": "moe-scale sweep r.py", "commit": "abc", "device": "a CPU",
        "packages": {"python": "3", "torch": "2", "deepspeed": "0"}, "parallel": 1,
    }  # fmt: skip
    scores = {"eval/loss": "lower", "eval/bleu": "higher"}
    plan = Plan("r.py", {"settings": []}, factors, False, "eval/loss", scores, 1, [planned(t) for t in trials], origin)
    return Plan(**{**vars(plan), **more})


def write_run(folder: Path, name: str, losses: dict[int, float | None], *, tail: str = "") -> None:
    """A run of 20 tokens a step that logs every 10 steps: 1 s for the first step, then 0.1 s each."""
    run = folder / "trials" / name
    run.mkdir(parents=True)
    lines = []
    for step in (1, 10, 20):
        rate = 20.0 if step == 1 else 200.0
        lines.append({"step": step, "tokens": 20 * step, "loss": 1.0, "tokens_per_s": rate, "step_time_s": 20 / rate})
        if step in losses:
            loss = losses[step]
            lines.append({"step": step, "tokens": 20 * step, "eval/loss": loss, "eval/bleu": 3.0, "eval/tokens": 9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    if 20 in losses:
        write_mark(run, Mark(20, False, {"eval/loss": losses[20], "eval/bleu": 3.0}))


def test_tokens_flops_and_seconds_of_a_run(tmp_path: Path) -> None:
    (trial, _) = make_trials(space("moe.top_k=1,2"))
    write_run(tmp_path, trial.name, {10: 2.0, 20: 1.5}, tail='{"step": 2')
    (tmp_path / "trials" / f"{trial.name}.log").write_text(
        "model            1,630,656 parameters, 1,624,512 active a token\n"
    )
    row = sweep_report.read_row(a_plan([trial], ["moe.top_k"]), planned(trial), tmp_path)
    assert [(p.step, p.tokens, p.flops) for p in row.points] == [(10, 200, 20_000.0), (20, 400, 40_000.0)]
    assert [p.seconds for p in row.points] == pytest.approx([1.9, 2.9])
    assert row.points[-1].scores == {"eval/loss": 1.5, "eval/bleu": 3.0}
    assert (row.state, row.parameters, row.active_parameters) == ("finished", 1_630_656, 1_624_512)


def test_a_trial_that_stopped_early_is_finished_and_has_the_score_of_its_weights(tmp_path: Path) -> None:
    (trial,) = make_trials(space("moe.top_k=1"))
    write_run(tmp_path, trial.name, {10: 1.5, 20: 2.0})
    run, longer = tmp_path / "trials" / trial.name, planned(trial, max_steps=50)
    assert not sweep_report.is_finished(longer, "eval/loss", tmp_path), "at step 20 of 50"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "tokens": 400, "eval/loss": 1.5, "eval/bleu": 3.0, "eval/restored_step": 10}\n')
    write_mark(run, Mark(20, True, {"eval/loss": 1.5}))
    assert sweep_report.is_finished(longer, "eval/loss", tmp_path)
    assert not sweep_report.is_finished(longer, "eval/bleu", tmp_path), "a score that the run does not have"
    row = sweep_report.read_row(a_plan([trial], ["moe.top_k"]), longer, tmp_path)
    assert (row.state, row.score("eval/loss")) == ("finished", 1.5)


def test_an_evaluation_between_two_logged_steps() -> None:
    records = [
        {"step": 10, "tokens": 100, "tokens_per_s": 10.0},
        {"step": 15, "tokens": 150, "eval/loss": 1.0},
        {"step": 20, "tokens": 200, "tokens_per_s": 20.0},
        {"step": 22, "tokens": 220, "eval/loss": 1.0},
    ]
    points = sweep_report.points_of(records, ["eval/loss"], 1.0)
    assert [point.seconds for point in points] == pytest.approx([12.5, 16.0])
    assert sweep_report.points_of(records[1:2], ["eval/loss"], 1.0)[0].seconds is None
    assert [point.flops for point in points] == [150, 220], "tokens at the plan's FLOPs a token"
    records[0]["flops"] = 300.0  # what a run itself says, where it knows better
    assert [p.flops for p in sweep_report.points_of(records, ["eval/loss"], 1.0)] == [450, 660]


@pytest.fixture
def swept(tmp_path: Path) -> tuple[Plan, Path]:
    """A sweep of which the fourth trial failed, the fifth is at its middle, and the last has not begun."""
    trials = make_trials(space("moe.top_k=1,2,4", "optim.lr=0.001,0.1"))
    for trial, loss in zip(trials, (3.0, 2.0, None), strict=False):
        write_run(tmp_path, trial.name, {10: 4.0, 20: loss})
    (tmp_path / "trials" / f"{trials[3].name}.failed").write_text("failed with exit code 1 after 3 s\n    no | luck\n")
    write_run(tmp_path, trials[4].name, {10: 1.0})
    metrics = tmp_path / "trials" / trials[4].name / "metrics.jsonl"
    metrics.write_text(
        "".join(line for line in metrics.read_text().splitlines(keepends=True) if '"step": 20' not in line)
    )
    return a_plan(trials, ["moe.top_k", "optim.lr"]), tmp_path


class Unread(io.StringIO):
    """Standard output that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_the_files_of_a_report_are_there_whoever_reads_it(
    swept: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = swept
    monkeypatch.setattr(sys, "stdout", Unread())
    with pytest.raises(BrokenPipeError):
        sweep.report(plan, folder)
    for name in ("results.json", "sweep.md", "settings.png"):
        assert (folder / name).stat().st_size > 1000, name


def test_the_report_of_an_unfinished_sweep(swept: tuple[Plan, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plan, folder = swept
    report = sweep_report.make_report(plan, folder)
    states = [row.state for row in report.rows]
    assert states[:3] == ["finished"] * 3
    assert sorted(states[3:]) == ["at step 10 of 20", "failed", "not started"]
    assert [row.score("eval/loss") for row in report.rows][:3] == [2.0, 3.0, None]
    assert report.effects.observations == 2, "neither what is not finished nor what is no number"
    pictures = plot(report, folder)
    assert pictures == ["settings.png", "curves-eval-loss.png", "curves-eval-bleu.png"]
    assert all((folder / name).stat().st_size > 10_000 for name in pictures)
    sweep_report.write_report(report, folder, pictures)
    text = (folder / "sweep.md").read_text()
    assert "| 1 | 0.1 | 2.0000 | 3.0000 | 400 | 4.000e+04 | 2.9 | finished |" in text
    assert "not a number" in text
    assert "3 of 6 trials finished" in text
    assert "no | luck" in text
    for word in ("moe-scale sweep r.py", "commit abc", "a CPU"):
        assert word in text
    results = json.loads((folder / "results.json").read_text())
    assert [trial["state"] for trial in results["trials"]] == states
    assert results["trials"][0]["curve"][-1]["scores"]["eval/loss"] == 2.0
    assert "3 of 6 trials finished" in capsys.readouterr().out


def test_a_score_that_is_better_when_higher_is_sorted_so(swept: tuple[Plan, Path]) -> None:
    plan, folder = swept
    higher = Plan(**{**vars(plan), "scores": {"eval/loss": "higher"}})
    assert [row.score("eval/loss") for row in sweep_report.make_report(higher, folder).rows][:3] == [3.0, 2.0, None]


def test_a_sweep_of_which_nothing_has_begun(tmp_path: Path) -> None:
    plan = a_plan(make_trials(space("moe.top_k=1,2")), ["moe.top_k"])
    report = sweep_report.make_report(plan, tmp_path)
    assert plot(report, tmp_path) == []
    sweep_report.write_report(report, tmp_path, [])
    assert "0 of 2 trials finished" in (tmp_path / "sweep.md").read_text()


def test_of_many_lines_the_best_and_the_worst_have_colours(tmp_path: Path) -> None:
    trials = make_trials(space(f"moe.top_k={','.join(map(str, range(1, 21)))}"))
    for number, trial in enumerate(trials, 1):
        write_run(tmp_path, trial.name, {10: 9.0, 20: float(number)})
    report = sweep_report.make_report(a_plan(trials, ["moe.top_k"]), tmp_path)
    colours = colours_of(report)
    assert list(colours) == [f"top_k {n}" for n in (1, 2, 3, 4, 17, 18, 19, 20)]
    assert len(set(colours.values())) == 8
    assert len(colours) <= MAX_LINES
    assert "curves-eval-loss.png" in plot(report, tmp_path)


def test_values_of_all_kinds_can_be_drawn(tmp_path: Path) -> None:
    """Names, numbers over decades, 0 among them, drawn ones in bins, and repeats alone."""
    draws = read_space([], ["optim.lr=log:1e-5:1e-1", "a=choice:$x,y_y"], []).draws
    cases = {
        "grid": (space("a=0,1e-4,1e-2", "b=swiglu,gelu", variants={"moe": {}, "dense, $": {"c": "1"}}), False),
        "draws": (Space({}, draws, trials=12), True),
        "repeats": (space(seeds=(1, 2, 3)), False),
    }
    for name, (what, drawn) in cases.items():
        trials = make_trials(what)
        for number, trial in enumerate(trials):
            write_run(tmp_path / name, trial.name, {10: 9.0, 20: 1.0 + number % 5})
        report = sweep_report.make_report(a_plan(trials, what.factors, drawn=drawn), tmp_path / name)
        assert len(plot(report, tmp_path / name)) == 3
        told = " ".join(sweep_report.effect_notes(report))
        assert ("look clear (p < 0.05) in about 10% of sweeps" in told) == (name == "draws"), "of two settings"
        header, cells = sweep_report.table_of(report)
        assert ("seed" in header) == (name == "repeats")
        assert {len(line) for line in cells} == {len(header)}


# --- the plan in its folder ------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(swept: tuple[Plan, Path]) -> None:
    plan, folder = swept
    sweep_plan.write_plan(plan, folder)
    assert sweep_plan.read_plan(folder) == plan
    secret = [Planned(**{**vars(p), "argv": ["--x.api_key", "s3cret"]}) for p in plan.trials]
    sweep_plan.write_plan(Plan(**{**vars(plan), "trials": secret}), folder)
    assert "s3cret" not in (folder / "sweep.json").read_text()


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    assert sweep_plan.read_plan(tmp_path) is None
    (tmp_path / "trials").mkdir()
    with pytest.raises(ConfigError, match=r"holds trials, but no sweep\.json"):
        sweep_plan.read_plan(tmp_path)
    for text in ("", "{}", '{"format": 7}', '{"format": 1, "trials": []}', '{"format": 1, "trials": [{}]}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ConfigError, match="is no plan of a sweep"):
            sweep_plan.read_plan(tmp_path)


def test_other_arguments_and_other_meanings_are_refused(swept: tuple[Plan, Path]) -> None:
    plan, folder = swept
    stored = Plan(**{**vars(plan), "arguments": {"grid": ["a=1,2"], "settings": [], "repeats": 1}})
    sweep_plan.refuse_another(stored, {"grid": ["a=1,2"], "settings": [], "repeats": 1}, folder)
    with pytest.raises(ConfigError) as error:
        sweep_plan.refuse_another(stored, {"grid": ["a=1,3"], "settings": ["--seed", "1"], "repeats": 1}, folder)
    grid, settings = map(str, error.value.problems)
    assert grid.startswith(f"--grid: a=1,3, but the sweep in {folder} was started with a=1,2; give the same")
    assert settings.startswith("settings of the recipe: --seed 1, but")
    assert "was started with none" in settings
    sweep_plan.refuse_changed(plan, plan, folder)
    changed = [Planned(**{**vars(p), "resolved": {"settings": {"moe": {"top_k": 1}, "new": 1}}}) for p in plan.trials]
    with pytest.raises(ConfigError, match=r"^moe.top_k: is now 1, and was 2 when .* was begun; change it back"):
        sweep_plan.refuse_changed(plan, Plan(**{**vars(plan), "trials": changed}), folder)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    with sweep_run.locked(tmp_path) as lock:
        assert lock is not None
        with pytest.raises(ConfigError, match="is in use by another sweep"), sweep_run.locked(tmp_path):
            pass
    with sweep_run.locked(tmp_path):
        pass


# --- the command line ------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_dry_run_checks_and_prints_all_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    dense = ["--variant", "moe:", "--variant", "dense: moe.enabled=false"]
    what = ["--grid", "moe.num_experts=2,4", *dense, "--repeats", "2", "--seed", "5", "--output_dir", str(out)]
    cli.main(["sweep", RECIPE, *what, "--dry_run", *TINY])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "# 8 trials of 1 rank, compared by eval/loss"
    assert lines[2].startswith("# dense_num_experts-2_seed-5: moe.enabled=false moe.num_experts=2 seed=5; 4 steps, ")
    assert f"--output_dir {out}/trials/dense_num_experts-2_seed-5 --resume auto" in lines[3]
    assert sum("--seed=6" in line for line in lines) == 4
    assert not out.exists()


def test_a_dry_run_checks_the_reference_of_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that the command of a study can be tried before it is trained for hours."""
    what = ["--variant", "moe:", "--variant", "dense: moe.enabled=false", "--output_dir", str(tmp_path / "sweep")]
    cli.main(["sweep", RECIPE, *what, "--dry_run", "--reach", "dense", *TINY])
    assert capsys.readouterr().out.startswith("# 2 trials of 1 rank")
    assert "--reach: " in refused(capsys, RECIPE, *what, "--dry_run", "--reach", "dens", *TINY)


def test_problems_of_all_trials_come_before_any_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    what = ["--grid", "moe.num_experts=2,4,8", "--grid", "moe.top_k=2,4", "--no.such", "1", "--output_dir", str(out)]
    said = refused(capsys, RECIPE, *what, *TINY)
    assert "moe.top_k: 4 > moe.num_experts = 2 (in 1 of 6 trials: num_experts-2_top_k-4); choose 1 to 2" in said
    assert said.count("--no.such") == 1, "what is wrong for all is said once"
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "auto"], "--resume: is what a sweep gives each trial"),
        (["--moe.top_k=1"], "--moe.top_k: is what the sweep varies"),
        (["--metric", "eval/bleu"], "--metric: eval/bleu; choose one of eval/loss, eval/perplexity"),
        (["--grid", "moe.no_such=1,2"], "moe.no_such: no such setting"),
        (["--report_only"], "--report_only: {folder} holds no sweep"),
        (["--wandb_sweep", "w.yaml", "--parallel", "2"], "--parallel: with trials that W&B agents start"),
        (["--draw_seed", "3"], "--draw_seed: is of draws, and there are none"),
        (["--trial", "a=1"], "--grid: with --trial, which is one trial"),
    ],
)
def test_slips_on_the_command_line_are_named(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    said = refused(capsys, RECIPE, "--grid", "moe.top_k=1,2", "--output_dir", str(out), *TINY, *flags)
    assert message.format(folder=out) in said
    assert not out.exists()


def test_a_sweep_is_started_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "was started as several ranks; start it once" in refused(capsys, RECIPE, "--grid", "moe.top_k=1,2")


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sweep_run.devices, "detect", lambda: sweep_run.devices.Device("cuda", "a GPU", True, True))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6")
    monkeypatch.setenv("RANK", "0")
    environ = [sweep_run.environment(tmp_path, slot, 2, 2) for slot in (0, 1)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environ] == ["3,4", "5,6"]
    assert all("RANK" not in e for e in environ)


# --- W&B -------------------------------------------------------------------------------------------------------------


def test_the_file_of_a_wandb_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taken by what W&B's own client does with such a file, its agent's command line included."""
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution as validate
    from wandb.sdk.launch.sweeps import utils

    path, out = tmp_path / "grid.yaml", tmp_path / "sweep"
    what = ["--grid", "moe.top_k=1,2", "--variant", "moe:", "--variant", "dense, equal: moe.enabled=false"]
    cli.main(["sweep", RECIPE, *what, "--repeats", "2", "--output_dir", str(out), *TINY, "--wandb_sweep", str(path)])
    content = validate(yaml.safe_load(path.read_text()))
    assert content["method"] == "grid"
    assert content["metric"] == {"name": "eval/loss", "goal": "minimize"}
    assert content["parameters"] == {
        "moe.top_k": {"values": [1, 2]},
        "variant": {"values": ["moe", "dense, equal"]},
        "seed": {"values": [1234, 1235]},
    }
    args = {"moe.top_k": {"value": 2}, "variant": {"value": "dense, equal"}, "seed": {"value": 1235}}
    flags = utils.create_sweep_command_args({"args": args})["args"]
    command = utils.create_sweep_command(content["command"])
    place = command.index("${args}")
    assert [*command[:place], *flags] == [
        "moe-scale", "sweep", RECIPE, "--output_dir", str(out), *what[2:3], "moe: ", *what[4:], *TINY, "--trial",
        "--moe.top_k=2", "--variant=dense, equal", "--seed=1235",
    ]  # fmt: skip
    assert "exists; choose another name" in refused(capsys, RECIPE, *what, *TINY, "--wandb_sweep", str(path))

    path = tmp_path / "random.yaml"
    draws = [
        "--draw",
        "optim.lr=log:1e-4:1e-2",
        "--draw",
        "moe.top_k=int:1:3",
        "--draw",
        "moe.activation=choice:gelu,swiglu",
    ]
    cli.main(
        [
            "sweep",
            RECIPE,
            *draws,
            "--draw",
            "optim.beta1=uniform:0.5:0.9",
            "--trials",
            "4",
            *TINY,
            "--wandb_sweep",
            str(path),
        ]
    )
    content = yaml.safe_load(path.read_text())
    assert validate(content) == content, "W&B has no distribution to guess"
    assert (content["method"], content["run_cap"]) == ("random", 4)
    assert content["parameters"] == {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "moe.top_k": {"distribution": "int_uniform", "min": 1, "max": 3},
        "moe.activation": {"values": ["gelu", "swiglu"]},
        "optim.beta1": {"distribution": "uniform", "min": 0.5, "max": 0.9},
    }


def test_the_one_trial_of_an_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variants = {"moe": {}, "dense": {"moe.enabled": "false"}}
    assert trial_settings(["--moe.top_k=2", "--variant=dense", "seed=3"], variants) == {
        "moe.top_k": "2", "moe.enabled": "false", "seed": "3",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no variant 'sparse'; choose one of moe, dense"):
        trial_settings(["--variant=sparse"], variants)
    with pytest.raises(ConfigError, match="unexpected word '2'"):
        trial_settings(["--moe.top_k", "2"][1:], variants)
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert trial_folder(tmp_path, ["--moe.top_k=2", "seed=3"]).name == "top_k-2_seed-3"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert trial_folder(tmp_path, ["--moe.top_k=2"]).name == "abc"
