"""The live line on a terminal, and plain lines everywhere else."""

from __future__ import annotations

import io
import itertools
import math
import re

import pytest

from moe_scale.telemetry.progress import PLAIN_INTERVAL_S, Progress, format_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_plain(steps: int, seconds_per_step: float, total: int | None = None) -> list[str]:
    clock, out = Clock(), io.StringIO()
    with Progress(total or steps, enabled=True, stream=out, clock=clock) as progress:
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            progress.update(step, loss=2.0, tokens_per_s=12345.6, extra={"aux": "0.10"})
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()
    return out.getvalue().splitlines()


def test_plain_lines_hold_all_there_is_to_know():
    assert run_plain(2, seconds_per_step=60.0)[-1] == ("step 2/2  loss 2.0000  12,346 tokens/s  0:00:00 left  aux 0.10")


@pytest.mark.parametrize("seconds_per_step", [0.01, 1.0, 3.0])
def test_fast_steps_print_at_most_one_line_per_interval(seconds_per_step):
    lines = run_plain(100, seconds_per_step)
    steps = [int(re.match(r"step (\d+)/", line)[1]) for line in lines]
    assert steps[0] == 1
    assert steps[-1] == 100
    gaps = [(b - a) * seconds_per_step for a, b in itertools.pairwise(steps[:-1])]
    assert all(gap >= PLAIN_INTERVAL_S for gap in gaps)
    assert len(lines) <= 100 * seconds_per_step / PLAIN_INTERVAL_S + 2


def test_slow_steps_print_every_line():
    assert len(run_plain(5, seconds_per_step=30.0)) == 5


def test_a_run_that_stops_early_still_shows_its_last_step():
    assert run_plain(7, seconds_per_step=0.1, total=1000)[-1].startswith("step 7/1000 ")


def test_time_left_ignores_a_step_that_waited_for_an_evaluation():
    clock = Clock()
    progress = Progress(1000, enabled=True, stream=io.StringIO(), clock=clock)
    progress.update(10, loss=1.0, tokens_per_s=1.0)
    assert progress.seconds_left is None  # nothing is known yet, least of all from the first, slow step
    for step in range(20, 110, 10):
        clock.now += 500.0 if step == 50 else 20.0
        progress.update(step, loss=1.0, tokens_per_s=1.0)
    assert progress.seconds_left == pytest.approx(900 * 2.0)


def test_time_left_follows_a_lasting_change_of_speed():
    clock = Clock()
    progress = Progress(10_000, enabled=True, stream=io.StringIO(), clock=clock)
    for step in range(1, 201):
        clock.now += 1.0 if step <= 100 else 3.0
        progress.update(step, loss=1.0, tokens_per_s=1.0)
    assert progress.seconds_left == pytest.approx(9800 * 3.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (5025, "1:23:45"),
        (360_000, "100:00:00"),
        (None, "-:--:--"),
        (math.inf, "-:--:--"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_other_ranks_print_nothing(capsys):
    with Progress(3, enabled=False) as progress:
        progress.update(1, loss=1.0, tokens_per_s=1.0)
        progress.message("hello")
    assert capsys.readouterr().out == ""


def test_odd_numbers_do_not_break_a_line(capsys):
    with Progress(3, enabled=True) as progress:
        progress.update(1, loss=math.nan, tokens_per_s=math.nan)
        progress.message("saved [bold]x[/bold] 1:2")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/3  loss nan  - tokens/s  -:--:-- left",
        "saved [bold]x[/bold] 1:2",
    ]


def test_terminal_shows_one_live_line_and_keeps_messages(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Progress(3, enabled=True, stream=out, start_step=1) as progress:
        progress.update(2, loss=1.5, tokens_per_s=1000.0)
        progress.message("saved [red]3[/red] :smile: " + "x" * 200)
        progress.update(3, loss=1.25, tokens_per_s=1000.0, extra={"aux": "0.10"})
    progress.close()  # a second time does no harm
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "saved [red]3[/red] :smile: " + "x" * 200 in text  # as it was given, whole, on a line of its own
    last = text.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("3/3")
    assert "loss 1.2500  1,000 tokens/s" in last
    assert "aux 0.10" in last


def test_a_narrow_terminal_keeps_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "50")
    out = Terminal()
    with Progress(3, enabled=True, stream=out) as progress:
        progress.update(1, loss=1.5, tokens_per_s=1e6, extra={"aux": "0.10", "entropy": "0.98", "dropped": "0.01"})
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").split("\n")
    assert all(len(line) <= 50 for line in lines)
    assert "\x1b[1A" not in out.getvalue()  # one line never has to move up to be redrawn


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(1, enabled=True, stream=out) as progress:
        progress.update(1, loss=1.5, tokens_per_s=1.0)
    assert out.getvalue() == "step 1/1  loss 1.5000  1 tokens/s  -:--:-- left\n"
