"""A run whose ranks are killed at random moments, and continued each time: its curve is that of one left alone."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.curves import CharacterRuns, Curve, Runs
from tests.ranks import REPO, Ranks

pytestmark = pytest.mark.slow
RECIPE = str(REPO / "recipes" / "lm_16l.py")


def start(runs: Runs, name: str, steps: int) -> Ranks:
    extra = ("--moe.ep_size", "2", "--checkpoint.every", "3", "--max_steps", str(steps), "--resume", "auto")
    return Ranks(2, [RECIPE, *runs.argv(name, 2, stage=3, extra=extra)])


def train_to_the_end(runs: Runs, name: str, steps: int) -> Curve:
    with start(runs, name, steps) as ranks:
        ended = ranks.wait(timeout=60 + 5 * steps)
    assert ended.codes == [0, 0], ended
    curve = runs.curve(name)
    assert len(curve) == steps
    return curve


def wait_for_a_step(ranks: Ranks, run_dir: Path) -> None:
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while "lm_16l at scale" not in ranks.output(0):  # the records of what is undone are gone by then
        assert time.monotonic() < deadline, ranks.wait(0)
        assert ranks.processes[0].poll() is None, ranks.wait(0)
        time.sleep(0.05)
    size = metrics.stat().st_size if metrics.exists() else 0
    while not metrics.exists() or metrics.stat().st_size == size:
        assert time.monotonic() < deadline, ranks.wait(0)
        time.sleep(0.02)


def wait_for_a_save(ranks: Ranks, run_dir: Path) -> None:
    deadline = time.monotonic() + 100
    while not list(run_dir.glob("checkpoints/.step_*.partial")):
        assert time.monotonic() < deadline, ranks.wait(0)
        time.sleep(0.001)


def kill_many_times(runs: Runs, kills: int, steps: int, longest_wait: float, seed: int) -> None:
    """Kill one random rank ``kills`` times, every other time while a checkpoint is written."""
    whole = train_to_the_end(runs, f"whole-{kills}", steps)
    name = f"killed-{kills}"
    run_dir, rng = runs.folder / name, random.Random(seed)
    killed = during_saves = 0
    for number in range(kills):
        with start(runs, name, steps) as ranks:
            wait_for_a_step(ranks, run_dir)
            if number % 2:
                time.sleep(rng.uniform(0, longest_wait))
            else:
                wait_for_a_save(ranks, run_dir)
                time.sleep(rng.uniform(0, 0.1))
            victim = rng.randrange(2)
            ranks.processes[victim].kill()
            during_saves += bool(list(run_dir.glob("checkpoints/.step_*.partial")))
            ended = ranks.wait(timeout=60)
        assert ended.codes[victim] == -signal.SIGKILL, f"the run was over before its kill: {ended}"
        assert ended.codes[1 - victim] == 1, f"the other rank must end by itself, within a minute: {ended}"
        lost = ("rank 0 is lost", "lost rank 1 on ")[victim]
        said = ended.told(1 - victim)
        assert len(said) == 1, ended
        assert said[0].startswith(f"error: {lost}"), ended
        killed += 1
        curve = runs.curve(name)
        assert curve == whole[: len(curve)], f"after {killed} kills"
        print(f"kill {killed} of {kills}: rank {victim} at step {len(curve)}", flush=True)
    assert killed == kills
    assert during_saves >= kills // 4
    assert train_to_the_end(runs, name, steps) == whole
    assert not list(run_dir.glob("checkpoints/.step_*")), "what was cut off is swept away"


def test_two_kills(tmp_path: Path) -> None:
    kill_many_times(CharacterRuns(tmp_path), kills=2, steps=15, longest_wait=0.5, seed=1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path: Path) -> None:
    """Of a model whose checkpoints take long enough to be met while they are written."""
    kill_many_times(Runs(tmp_path), kills=20, steps=150, longest_wait=3.0, seed=2)
