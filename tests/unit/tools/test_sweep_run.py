"""How a sweep trains its trials, with trials that do next to nothing: order, failures, signals, locks."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe_scale.errors import ConfigError
from moe_scale.tools import sweep_run
from moe_scale.tools.sweep_plan import Plan, Planned
from moe_scale.tools.sweep_trials import Trial
from moe_scale.train.faults import EXIT_PREEMPTED, PreemptedError

RECIPE = """
import json, os, signal, sys, time
from pathlib import Path
what, folder = sys.argv[1], Path(sys.argv[sys.argv.index("--output_dir") + 1])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
folder.mkdir(parents=True, exist_ok=True)
starts = folder / "starts"
starts.write_text((starts.read_text() if starts.exists() else "") + f"{time.time()} {os.getpid()}\\n")
def end(step):
    scores = {"eval/loss": 2.5}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "tokens": 8 * step, **scores}) + "\\n")
    if step == 10 and what != "decoding":
        mark = {"step": step, "stopped_early": False, "scores": scores}
        (folder / "finished.json").write_text(json.dumps(mark))
def wait(until):
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)
if what == "fails":
    print("line 1\\n\\nno luck")
    sys.exit(3)
if what == "waits" and len(starts.read_text().splitlines()) == 1:
    wait(lambda: asked)
    end(5)
    sys.exit(75)
if what == "stops":
    end(5)
    sys.exit(75)
if what == "pair":
    wait(lambda: len(list(folder.parent.glob("pair-*/starts"))) == 2)
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "decoding" and len(starts.read_text().splitlines()) == 2:
    what = "decoded"
end(10)
if what == "decoding":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(4 if what == "late" else 0)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def a_plan(recipe: str, *names: str, ranks: int = 1) -> Plan:
    trials = [Planned(Trial(n, "", {"a": n}, {"a": n}), [n.partition("-")[0]], 10, 1.0, {}) for n in names]
    return Plan(recipe, {}, ["a"], False, "eval/loss", {"eval/loss": "lower"}, ranks, trials, {})


@contextmanager
def signals(number: int, when: Any) -> Iterator[None]:
    """Send this process a signal once ``when`` holds, from a thread, while the block runs."""

    def send() -> None:
        deadline = time.monotonic() + 20
        while not when() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def starts(folder: Path, name: str) -> int:
    path = folder / "trials" / name / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_trials_run_in_order_and_a_failure_stops_none(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = a_plan(recipe, "good-1", "fails", "stops", "dies", "good-2")
    (tmp_path / "trials").mkdir()
    assert not sweep_run.train_trials(plan, tmp_path, 1, None)
    said = re.sub(r"[0-9]+ s\b", "0 s", capsys.readouterr().out)
    log = tmp_path / "trials" / "fails.log"
    assert said.splitlines() == [
        "[1/5] good-1: eval/loss 2.5000, 0 s",
        f"[2/5] fails: FAILED with exit code 3 after 0 s; the end of {log}:",
        "    line 1",
        "    no luck",
        "[3/5] stops: stopped after 0 s; the next start goes on",
        f"[4/5] dies: FAILED with signal 9 after 0 s; the end of {tmp_path / 'trials' / 'dies.log'}:",
        "[5/5] good-2: eval/loss 2.5000, 0 s",
    ]
    assert (tmp_path / "trials" / "fails.failed").read_text().endswith("    line 1\n    no luck\n")

    Path(recipe).write_text(RECIPE.replace('what == "fails"', 'what == "never"'))
    assert not sweep_run.train_trials(plan, tmp_path, 1, None)
    assert [starts(tmp_path, p.trial.name) for p in plan.trials] == [1, 2, 2, 2, 1]
    assert not (tmp_path / "trials" / "fails.failed").exists(), "a trial that ends well has not failed"
    assert "[1/5] good-1: eval/loss 2.5000, trained before" in capsys.readouterr().out


def test_a_trial_that_fails_after_its_last_evaluation_is_not_done(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trials").mkdir()
    assert not sweep_run.train_trials(a_plan(recipe, "late"), tmp_path, 1, None)
    assert "late: FAILED with exit code 4" in capsys.readouterr().out
    assert not sweep_run.train_trials(a_plan(recipe, "late"), tmp_path, 1, None)
    assert starts(tmp_path, "late") == 2, "it is tried again"


def test_a_trial_that_is_killed_after_its_last_evaluation_is_not_done(recipe: str, tmp_path: Path) -> None:
    """As while it decodes the test sentences; the sweep itself may be killed with it, and then notes no failure."""
    (tmp_path / "trials").mkdir()
    plan = a_plan(recipe, "decoding")
    assert not sweep_run.train_trials(plan, tmp_path, 1, None)
    plan.trials[0].failure(tmp_path).unlink()
    assert not sweep_run.is_finished(plan.trials[0], plan.metric, tmp_path)
    assert sweep_run.train_trials(plan, tmp_path, 1, None)
    assert starts(tmp_path, "decoding") == 2


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, PreemptedError), (signal.SIGUSR1, PreemptedError), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_lets_the_trial_save_and_starts_no_other(
    number: signal.Signals, error: type[BaseException], recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = a_plan(recipe, "good-1", "waits", "good-2")
    (tmp_path / "trials").mkdir()
    before = signal.getsignal(number)
    with signals(number, lambda: starts(tmp_path, "waits")), pytest.raises(error) as ended:
        sweep_run.train_trials(plan, tmp_path, 1, None)
    said = capsys.readouterr()
    text = f"stopped by {number.name}: 1 of 3 trials are done; the same command goes on"
    assert text in (said.err if number == signal.SIGINT else str(ended.value))
    assert getattr(ended.value, "exit_code", 130) == (130 if number == signal.SIGINT else EXIT_PREEMPTED)
    assert "[2/3] waits: stopped after" in said.out
    assert starts(tmp_path, "good-2") == 0
    assert signal.getsignal(number) == before
    assert sweep_run.train_trials(plan, tmp_path, 1, None)
    assert [starts(tmp_path, p.trial.name) for p in plan.trials] == [1, 2, 1]


def test_two_at_once(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the first two waits for the other one to start; a signal reaches both of the last two."""
    plan = a_plan(recipe, "pair-1", "pair-2", "waits-1", "waits-2", "good")
    (tmp_path / "trials").mkdir()
    both = lambda: starts(tmp_path, "waits-1") and starts(tmp_path, "waits-2")  # noqa: E731
    with signals(signal.SIGTERM, both), pytest.raises(PreemptedError, match="2 of 5 trials"):
        sweep_run.train_trials(plan, tmp_path, 2, None)
    said = capsys.readouterr().out
    for name in ("pair-1: eval/loss", "pair-2: eval/loss", "waits-1: stopped", "waits-2: stopped"):
        assert said.count(name) == 1
    assert sweep_run.train_trials(plan, tmp_path, 2, None)


def test_an_error_in_the_sweep_leaves_no_trial_behind(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan(recipe, "good-1", "waits")
    (tmp_path / "trials").mkdir()

    def full(*_: object, **__: object) -> str:
        while not starts(tmp_path, "waits"):
            time.sleep(0.02)
        raise OSError("no space left")

    monkeypatch.setattr(sweep_run, "_end", full)
    with pytest.raises(OSError, match="no space"):
        sweep_run.train_trials(plan, tmp_path, 2, None)
    pid = int((tmp_path / "trials" / "waits" / "starts").read_text().split()[1])
    assert not psutil.pid_exists(pid)


def test_a_trial_that_outlives_its_sweep_keeps_the_folder(recipe: str, tmp_path: Path) -> None:
    """As when the sweep is killed by SIGKILL: another start must not train into the same folder."""
    (tmp_path / "trials").mkdir()
    plan = a_plan(recipe, "waits")
    with sweep_run.locked(tmp_path) as lock:
        left = sweep_run._start(plan, plan.trials[0], tmp_path, 0, 1, lock)
    try:
        with pytest.raises(ConfigError, match="by a trial that one left behind"), sweep_run.locked(tmp_path):
            pass
        while not starts(tmp_path, "waits"):
            time.sleep(0.02)
    finally:
        left.process.terminate()
    assert left.process.wait(timeout=20) == EXIT_PREEMPTED
    with sweep_run.locked(tmp_path):
        pass


def test_the_command_of_a_trial_with_several_ranks(recipe: str, tmp_path: Path) -> None:
    plan = a_plan(recipe, "good", ranks=4)
    words = sweep_run.trial_command(plan, plan.trials[0], tmp_path)
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert words[6:] == [recipe, "good", "--output_dir", f"{tmp_path}/trials/good", "--resume", "auto"]
