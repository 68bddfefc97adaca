"""ZeRO-3 with hierarchical partitions (hpZ): the curve of one rank, and checkpoints that know nothing of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.curves import CharacterRuns, Runs, assert_same

STEPS = 10
HPZ = ("zero_optimization.zero_hpz_partition_size=2",)
OFFLOAD = ("zero_optimization.offload_optimizer.device=cpu", "zero_optimization.offload_param.device=cpu")
SAVING = ("--max_steps", str(STEPS), "--optim.schedule", "constant", "--checkpoint.every", str(STEPS // 2))
HALFWAY = Path("checkpoints") / f"step_{STEPS // 2:08d}"
LAST = Path("checkpoints") / f"step_{STEPS:08d}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return CharacterRuns(tmp_path_factory.mktemp("runs"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_hierarchical_partitions_give_the_curve_of_one_rank_and_resume_to_the_bit(runs: Runs) -> None:
    """Four ranks, as two nodes of two. The copies that hpZ keeps are no part of a checkpoint, and have to follow it."""
    one = runs.train(1, {"one": runs.argv("one", 1, stage=0, extra=SAVING)})["one"]
    cases = {
        "hpz": runs.argv("hpz", 4, stage=3, ds=HPZ, extra=SAVING),
        "offloaded": runs.argv("offloaded", 4, stage=3, ds=(*HPZ, *OFFLOAD), extra=(*SAVING, "--zero_init", "false")),
        "plain": runs.argv("plain", 4, stage=3, extra=SAVING),  # after the others: their groups are not taken for its
    }
    whole = runs.train(4, cases)
    assert_same(whole, one)
    resumed = {"hpz": cases["hpz"], "offloaded": cases["offloaded"], "into-plain": []}
    for name in ("hpz", "offloaded"):
        shutil.rmtree(runs.folder / name / LAST)
    shutil.copytree(runs.folder / "hpz" / HALFWAY, runs.folder / "into-plain" / HALFWAY)
    shutil.copy(runs.folder / "hpz" / "metrics.jsonl", runs.folder / "into-plain")
    resumed["into-plain"] = runs.argv("into-plain", 4, stage=3, extra=SAVING)
    again = runs.train(4, {name: [*argv, "--resume", "must"] for name, argv in resumed.items()})
    assert again["hpz"] == whole["hpz"]
    assert again["offloaded"] == whole["offloaded"]
    assert (runs.folder / "hpz" / LAST).is_dir()
    assert_same({"into-plain": again["into-plain"]}, one)
