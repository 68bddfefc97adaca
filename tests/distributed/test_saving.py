"""What is saved, kept and taken up again, on two ranks: full disks, damaged checkpoints, another model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_scale.checkpoint.index import read_index, verify
from moe_scale.train.lock import alone_in
from tests.curves import CharacterRuns, Runs
from tests.distributed.faulty import case, run_cases

pytestmark = pytest.mark.slow
EXTRA = ("--moe.ep_size", "2", "--optim.schedule", "constant", "--eval.sink_sequences", "0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("saving"))


def argv(runs: Runs, name: str, *extra: str) -> list[str]:
    return runs.argv(name, 2, stage=3, extra=(*EXTRA, *extra))


def saved(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def damage(checkpoint: Path) -> None:
    """One bit of one tensor, which only the checksum tells."""
    path = next(checkpoint.glob("optimizer-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_which_checkpoints_stay_and_which_are_taken_up(tmp_path: Path) -> None:
    runs = CharacterRuns(tmp_path)
    keep = ("--checkpoint.every", "2", "--checkpoint.keep_last", "2", "--checkpoint.keep_every", "4")
    best = ("--checkpoint.save_best", "eval/loss", "--eval.every", "3", "--checkpoint.background", "false")
    whole = argv(runs, "whole", "--max_steps", "10")
    kept = argv(runs, "kept", "--max_steps", "10", *keep, *best)
    ends, _ = run_cases(runs, {"whole": case(whole), "kept": case(kept)}, "kept")
    assert all(end["outcome"] == "" for both in ends.values() for end in both)
    curve = runs.curve("whole")
    assert runs.curve("kept") == curve, "saving and scoring change nothing"
    folder = runs.folder / "kept"
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    scores = {r["step"]: r["eval/loss"] for r in records if "eval/loss" in r}
    best_step = min(scores, key=lambda step: scores[step])
    saved_steps = {2, 4, 6, 8, 10} | {s for s in scores if scores[s] == min(scores[n] for n in scores if n <= s)}
    steps = {*sorted(saved_steps)[-2:], 4, 8, best_step}  # the two newest, multiples of four, and the best
    assert set(saved(folder)) == {"best", "latest", *(f"step_{step:08d}" for step in steps)}
    assert (folder / "checkpoints" / "best").resolve().name == f"step_{best_step:08d}"
    assert (folder / "checkpoints" / "latest").resolve().name == "step_00000010"
    assert read_index(folder / "checkpoints" / "latest").scores["best"] == {
        "score": "eval/loss",
        "value": scores[best_step],
    }

    for name in ("auto", "must", "all", "model"):
        for step in (4, 8):
            part = f"checkpoints/step_{step:08d}"
            shutil.copytree(folder / part, runs.folder / name / part)
        shutil.copy(folder / "metrics.jsonl", runs.folder / name)
        if name != "model":
            damage(runs.folder / name / "checkpoints" / "step_00000008")
    damage(runs.folder / "all" / "checkpoints" / "step_00000004")
    half = runs.folder / "auto" / "checkpoints" / ".step_00000009.partial"
    half.mkdir()
    (half / "index.json").write_text("half")
    before = {name: listing(runs.folder / name) for name in ("must", "all", "model")}
    cases = {
        "auto": case([*argv(runs, "auto", "--max_steps", "10"), "--resume", "auto"]),
        "must": case([*argv(runs, "must", "--max_steps", "10"), "--resume", "must"]),
        "all": case([*argv(runs, "all", "--max_steps", "10"), "--resume", "auto"]),
        "again": case([*argv(runs, "all", "--max_steps", "10"), "--resume", "auto"]),
        "model": case([*argv(runs, "model", "--max_steps", "10"), "--resume", "auto", "--model.d_model", "64"]),
        "held": case(argv(runs, "held")),
    }
    held = runs.folder / "held"
    with alone_in(held, "nobody"):
        ends, printed = run_cases(runs, cases, "taken_up")
        assert os.listdir(held) == [".lock"]
    outcomes = {name: both[0]["outcome"] for name, both in ends.items()}
    this = f"process {os.getpid()} on host {socket.gethostname()}, since "
    assert outcomes["held"].startswith(
        f"ConfigError: output_dir: {runs.folder}/held is in use by another start, {this}"
    )
    assert outcomes["held"].endswith("; wait for its end, or choose another folder")
    assert not list(runs.folder.glob("*/.lock")), "who ends gives the folder back"
    assert all(both[0] == both[1] for both in ends.values())
    assert outcomes["auto"] == ""
    assert runs.curve("auto") == curve
    assert saved(runs.folder / "auto") == [
        "latest",
        "step_00000004",
        "step_00000008.damaged-1",
        "step_00000010",
    ]
    assert "warning: step_00000008 is damaged and now called step_00000008.damaged-1; step_00000004 is taken" in printed
    for name, damaged in (("must", 1), ("all", 2), ("again", 2)):
        assert outcomes[name].startswith("ConfigError: "), name
        assert outcomes[name].count("is not what was written") == damaged, name
        assert len(outcomes[name].splitlines()) == damaged, name
    assert outcomes["model"].splitlines() == [
        "ConfigError: resume: model.d_model: step_00000008 was saved with 32, this run has 64; continue with "
        "model.d_model 32"
    ]
    assert {name: listing(runs.folder / name) for name in before} == before, "a refused start changes nothing"


def listing(folder: Path) -> dict[str, float]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime for path in folder.rglob("*")}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_and_not_the_run(runs: Runs) -> None:
    """A checkpoint is 19 MB. One run finds the disk full for a while, the other when it saves for the last time."""
    every = ("--checkpoint.every", "2", "--checkpoint.keep_last", "0", "--max_steps", "6")
    with small_disk(runs.folder / "disk", 50) as disk:
        filler = str(disk / "filler")
        cases = {
            "for a while": case(
                argv(runs, "disk/while", *every, "--checkpoint.background", "false"),
                {"step": 3, "rank": 0, "fill": filler},
                {"step": 5, "rank": 0, "delete": filler},
            ),
            # What the first has saved stays: there is no room for another.
            "at the end": case(argv(runs, "disk/end", *every)),
        }
        ends, printed = run_cases(runs, cases, "disk_full")
        outcomes = {name: both[0]["outcome"] for name, both in ends.items()}
        assert all(both[0] == both[1] for both in ends.values())
        assert outcomes["for a while"] == ""
        assert saved(disk / "while") == ["latest", "step_00000002", "step_00000006"]
        for name in ("step_00000002", "step_00000006"):
            path = disk / "while" / "checkpoints" / name
            verify(path, read_index(path))
        warnings = [line for line in printed.splitlines() if "was not saved, the run goes on" in line]
        assert sum(line.startswith("warning: step_00000004 was not saved") for line in warnings) >= 1
        assert all("No space left on device" in line for line in warnings), warnings
        assert outcomes["at the end"].startswith("NotSavedError: step 6 was not saved: rank ")
        assert "No space left on device" in outcomes["at the end"]
        assert len(outcomes["at the end"].splitlines()) == 1
        ended = printed.rpartition("warning: step_00000006 was not saved")[2]
        assert "held-out loss " in ended, "what the run was for is told all the same"
        assert not (disk / "end" / "finished.json").exists()
