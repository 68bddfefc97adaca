"""Runs in which something goes wrong, on two real ranks: they skip, go back, go on, or end with one line."""

from __future__ import annotations

import json
import re
import signal
import time
from typing import Any

import pytest

from moe_scale.parallel import device as devices
from moe_scale.train.faults import EXIT_PREEMPTED
from moe_scale.train.finished import read_mark
from tests.curves import CharacterRuns, Runs
from tests.distributed.faulty import WORKER, Case, case, run_cases
from tests.ranks import Ranks

pytestmark = pytest.mark.slow
EP2 = ("--moe.ep_size", "2")
ONE_MICRO_BATCH = ("train_micro_batch_size_per_gpu=4", "gradient_accumulation_steps=1")


def ranks_of(runs: Runs, name: str, the_case: Case) -> Ranks:
    """Two ranks that train one case, as a recipe without a launcher."""
    listed = runs.folder / f"{name}.case.json"
    listed.write_text(json.dumps([the_case]))
    return Ranks(2, [WORKER, str(listed)])


def records(runs: Runs, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs.folder / name / "metrics.jsonl").read_text().splitlines()]


def steps(runs: Runs, name: str) -> list[dict[str, Any]]:
    return [record for record in records(runs, name) if "loss" in record]


def events(runs: Runs, name: str, *kinds: str) -> list[dict[str, Any]]:
    """Events of a run, of some kinds or all, without their times."""
    lines = map(json.loads, (runs.folder / name / "events.jsonl").read_text().splitlines())
    found = [{key: value for key, value in line.items() if key != "time"} for line in lines]
    return [event for event in found if not kinds or event["event"] in kinds]


def saved(runs: Runs, name: str) -> list[str]:
    return sorted(path.name for path in (runs.folder / name / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return CharacterRuns(tmp_path_factory.mktemp("faults"))


def bad_step_cases(runs: Runs) -> dict[str, Case]:
    """Step 2: the loss of one micro-batch of one rank; step 4: one gradient of one rank; 5 steps."""
    offload = "zero_optimization.offload_optimizer.device=cpu"
    layouts: dict[str, dict[str, Any]] = {}
    for stage in range(4):
        layouts[f"zero{stage}-fp32"] = {"stage": stage}
        layouts[f"zero{stage}-bf16"] = {"stage": stage, "ds": ("bf16.enabled=true",)}
        if stage in (1, 2):  # without a sum of micro-batches to keep, DeepSpeed takes another optimizer
            layouts[f"zero{stage}-bf16-one"] = {"stage": stage, "ds": ("bf16.enabled=true", *ONE_MICRO_BATCH)}
        if devices.detect().fp16:
            layouts[f"zero{stage}-fp16"] = {"stage": stage, "ds": ("fp16.enabled=true", "fp16.initial_scale_power=8")}
    layouts["ep2-fp32"] = {"stage": 3, "extra": EP2}
    layouts["ep2-bf16"] = {"stage": 3, "extra": EP2, "ds": ("bf16.enabled=true",)}
    layouts["offload2"] = {"stage": 2, "ds": (offload,)}
    layouts["offload3"] = {"stage": 3, "ds": (offload, "bf16.enabled=true"), "extra": EP2}
    cases = {}
    for number, (name, layout) in enumerate(layouts.items()):
        short = ("--max_steps", "5", "--eval.max_tokens", "32", "--eval.sink_sequences", "0")
        argv = runs.argv(name, 2, **layout | {"extra": (*layout.get("extra", ()), *short)})
        loss = {"step": 2, "rank": number % 2, "loss": ("nan", "inf")[number // 2 % 2]}
        gradient = {"step": 4, "rank": 1 - number % 2, "gradient": "inf", "parameter": "router"}
        one = "one" in name
        cases[name] = case(argv, loss | {"micro_step": 0}, gradient | {"micro_step": 0 if one else 1})
    return cases


@pytest.mark.timeout(600)
def test_a_bad_step_of_one_rank_is_skipped_on_all(runs: Runs) -> None:
    """At every ZeRO stage and precision: nothing of the state changes, it is counted, and the part is named."""
    cases = bad_step_cases(runs)
    ends, printed = run_cases(runs, cases, "bad_steps", timeout=500)
    for name, both in ends.items():
        assert [end["outcome"] for end in both] == ["", ""], name
        logged = steps(runs, name)
        assert [record["step"] for record in logged] == [1, 2, 3, 4, 5], name
        assert [record["skipped_steps"] for record in logged] == [0, 1, 1, 2, 2], name
        assert [record["loss"] is None for record in logged] == [False, True, False, False, False], name
        assert logged[3]["grad_norm"] is None, name
        fp16 = "fp16" in name  # there, an infinite gradient is left to the loss scaler
        for end in both:
            assert end["skips"][1::2] == ["unchanged: True"] * (1 if fp16 else 2), name
            gradients = end["skips"][::2]
            if not fp16:
                assert gradients[0] == "gradients finite: False", f"{name}: every rank holds a share of a bad loss"
        if not fp16:
            assert "gradients finite: False" in [end["skips"][2] for end in both], name
    assert printed.count("warning: step 2 was skipped: the loss and the gradient of ") == len(cases)
    named = "warning: step 4 was skipped: the gradient of router is not a number"
    assert printed.count(named) == sum("fp16" not in name for name in cases)


def test_runs_that_are_beyond_help_and_runs_that_are_not(runs: Runs) -> None:
    """Bad steps in a row, spikes, a collapsed router: each run's end is asserted below."""
    spread = (*EP2, "--max_steps", "16", "--optim.schedule", "constant")
    spiky = (*spread, "--faults.spike_factor", "1.5", "--checkpoint.every", "4")
    bad = (*spread, "--faults.max_bad_steps", "3", "--checkpoint.every", "2")
    spikes = [{"step": step, "rank": 1, "loss": "9"} for step in (14, 15, 16)]
    cases = {
        "bad": case(
            runs.argv("bad", 2, stage=3, extra=bad),
            *({"step": step, "loss": "nan"} for step in (3, 4, 6, 7, 8)),
        ),
        "spike": case(runs.argv("spike", 2, stage=3, extra=spiky), spikes[0]),
        "spikes": case(runs.argv("spikes", 2, stage=3, extra=(*spiky, "--faults.max_rollbacks", "1")), *spikes[:2]),
        "no-checkpoint": case(
            runs.argv("no-checkpoint", 2, stage=3, extra=(*spiky, "--checkpoint.every", "100")), spikes[0]
        ),
        "collapsed": case(
            runs.argv(
                "collapsed",
                2,
                stage=3,
                extra=(*spread, "--max_steps", "6", "--faults.collapse_share", "0.51", "--faults.collapse_steps", "2"),
            )
        ),
        "smooth": case(runs.argv("smooth", 2, stage=3, extra=spread)),
    }
    ends, printed = run_cases(runs, cases, "beyond_help")
    outcomes = {name: both[0]["outcome"] for name, both in ends.items()}
    assert all(both[0]["outcome"] == both[1]["outcome"] for both in ends.values()), "all ranks end alike"

    assert re.match(
        r"DivergedError: the loss and the gradient of .* is not a number at step 8; .* 3 \(", outcomes["bad"]
    )
    assert saved(runs, "bad") == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    assert [r["loss"] is None for r in steps(runs, "bad")] == [False, False, True, True, False, True, True, True]

    assert [event["step"] for event in events(runs, "bad", "skipped")] == [3, 4, 6, 7, 8]
    first, *_, last = events(runs, "bad")
    assert first == {"event": "start", "step": 0, "resumed": False, "ranks": 2}
    assert (last["event"], last["step"], last["text"]) == ("stopped", 8, outcomes["bad"].partition(": ")[2])

    assert outcomes["spike"] == outcomes["no-checkpoint"] == outcomes["collapsed"] == outcomes["smooth"] == ""
    smooth, spike = steps(runs, "smooth"), steps(runs, "spike")
    assert [r["step"] for r in spike] == list(range(1, 17)), "the records of what was undone are gone"
    assert [r["loss"] for r in spike[:12]] == [r["loss"] for r in smooth[:12]]
    assert spike[12]["loss"] != smooth[12]["loss"], "it went on with later data"
    tokens = smooth[0]["tokens"]
    assert spike[11]["tokens"] == 12 * tokens
    assert spike[12]["tokens"] == 15 * tokens, "steps 13 and 14 were seen, and undone"

    (back,) = events(runs, "spike", "went back")
    assert (back["step"], back["to"]) == (14, 12)
    assert {event["step"] for event in events(runs, "spike", "saved")} == {4, 8, 12, 16}
    assert events(runs, "spike")[-1] == {"event": "finished", "step": 16}
    assert any("collapsed" in event["text"] for event in events(runs, "collapsed", "warning"))

    assert outcomes["spikes"].startswith("DivergedError: the loss spiked at step ")
    assert "after 1 returns" in outcomes["spikes"]
    assert len(steps(runs, "no-checkpoint")) == 16
    assert "the router has collapsed" in printed
    assert "warning: the loss spiked at step 14, and there is no checkpoint yet to go back to" in printed
    assert "warning: the loss spiked at step 14: back to step_00000012, and past the data since then" in printed


def test_preempted_runs_continue_to_the_bit(runs: Runs) -> None:
    """Signals that a rank gets while it computes, and a deadline; then the rest of the run."""
    spread = (*EP2, "--max_steps", "6")
    signals = {
        "term": {"step": 2, "rank": 1, "signal": "SIGTERM"},
        "usr1": {"step": 4, "rank": 0, "signal": "SIGUSR1"},
        "repeated": {"step": 4, "signal": "SIGTERM"},  # on both ranks: still one request
        "at-the-end": {"step": 6, "rank": 0, "signal": "SIGTERM"},
        "killed": {"step": "summary"},
    }
    argvs = {name: runs.argv(name, 2, stage=3, extra=spread) for name in ("whole", "deadline", *signals)}
    cases = {name: case(argvs[name], *([signals[name]] if name in signals else [])) for name in argvs}
    cases["deadline"] = case([*argvs["deadline"], "--max_time", "0:12"], {"step": 3, "rank": 0, "sleep": 8.0})
    ends, _ = run_cases(runs, cases, "preempted")
    stopped = {name: both[0]["outcome"] for name, both in ends.items()}
    assert stopped.pop("whole") == stopped.pop("at-the-end") == "", "a run that is at its end needs no second start"
    assert stopped.pop("deadline").startswith("PreemptedError: ")
    assert stopped.pop("killed") == "StoppedError: killed"
    assert [read_mark(runs.folder / name) for name in ("killed", "term")] == [None, None]
    expected = "PreemptedError: stopped and saved after step {}; --resume auto continues"
    assert stopped == {name: expected.format(signals[name]["step"]) for name in ("term", "usr1", "repeated")}
    assert 1 <= len(runs.curve("deadline")) < 6

    again = {name: case([*argvs[name], "--resume", "auto"]) for name in (*stopped, "deadline", "killed", "whole")}
    ends, printed = run_cases(runs, again, "again")
    assert all(end["outcome"] == "" for both in ends.values() for end in both)
    whole = runs.curve("whole")
    assert len(whole) == 6
    for name in argvs:
        assert runs.curve(name) == whole, name
        assert read_mark(runs.folder / name) == read_mark(runs.folder / "whole"), name
        assert len(records(runs, name)) == len(records(runs, "whole")), name
    told = [
        (event["event"], event["step"], event.get("resumed"))
        for event in events(runs, "term", "start", "stopped", "finished")
    ]
    assert told == [("start", 0, False), ("stopped", 2, None), ("start", 2, True), ("finished", 6, None)]
    assert {event["step"] for event in events(runs, "term", "saved")} >= {2, 6}
    assert printed.count("its last step is done; what is left is the end of the run") == 1
    assert f"{runs.folder / 'whole'} is finished, at step 6; a larger max_steps trains on" in printed.splitlines()
    assert not (runs.folder / "whole" / "run.1.json").exists(), "a start of a finished run changes nothing"


def test_a_hang_ends_by_a_list_of_where_all_are(runs: Runs) -> None:
    hangs = case(
        runs.argv("hangs", 2, stage=3, extra=(*EP2, "--faults.hang_minutes", "0.15")),
        {"step": 3, "rank": 1, "sleep": 10_000},
    )
    with ranks_of(runs, "hangs", hangs) as ranks:
        ended = ranks.wait(timeout=200)
    assert ended.codes == [1, 1], ended
    error, zero, one = ended.told(0)
    last = events(runs, "hangs")[-1]
    assert (last["event"], last["step"]) == ("stopped", 3), "rank 0 is in the third step"
    assert last["text"] == error
    assert error.startswith("error: no progress for 0.15 minutes; all ranks stop."), ended
    assert re.match(r"  rank 0 on \S+, process \d+, step 3: (forward|backward|update), for \d+ s", zero), ended
    assert re.match(r"  rank 1 on \S+, process \d+, step 3: forward, for \d+ s", one), ended
    assert ended.told(1) == [], ended


def test_a_second_signal_ends_a_rank_that_waits_in_a_collective(runs: Runs) -> None:
    waits = case(runs.argv("twice", 2, stage=3, extra=EP2), {"step": 3, "rank": 1, "sleep": 10_000})
    with ranks_of(runs, "twice", waits) as ranks:
        while "step 1/" not in ranks.output(0) and ranks.processes[0].poll() is None:
            time.sleep(0.1)
        time.sleep(3)
        ranks.processes[0].terminate()
        time.sleep(1.5)
        assert [p.poll() for p in ranks.processes] == [None, None], "the first is a request"
        ranks.processes[0].terminate()
        assert ranks.processes[0].wait(timeout=30) == 128 + signal.SIGTERM
        ended = ranks.wait(timeout=60)
    assert ended.codes == [143, 1], ended


def test_a_preempted_recipe_ends_with_its_exit_code(runs: Runs) -> None:
    stops = case(runs.argv("code", 2, stage=3, extra=EP2), {"step": 3, "rank": 1, "signal": "SIGUSR1"})
    with ranks_of(runs, "code", stops) as ranks:
        ended = ranks.wait(timeout=200)
    assert ended.codes == [EXIT_PREEMPTED] * 2, ended
    assert ended.told(0) == ["stopped and saved after step 3; --resume auto continues"], ended
    assert ended.told(1) == [], ended
