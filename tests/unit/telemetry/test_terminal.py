"""A reader of standard output that leaves: no stack trace, SIGPIPE's exit code; other broken pipes are errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_scale.telemetry.terminal import EXIT_READER_LEFT
from tests.ranks import REPO

TOOL = """
import sys, time
from moe_scale.telemetry.terminal import Console, leaving_with_the_reader

def waiting_for_its_reader_to_leave():
    print("a line", flush=True)
    sys.stdin.read()

with leaving_with_the_reader():
    waiting_for_its_reader_to_leave()
    {what}
"""


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("print('more', flush=True)", EXIT_READER_LEFT),
        ("print('more, which is flushed at the end')", EXIT_READER_LEFT),
        ("Console().print('more')", EXIT_READER_LEFT),
        ("print('more'); raise SystemExit(1)", EXIT_READER_LEFT),
        ("raise SystemExit(3)", 3),
        ("pass", 0),
    ],
)
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_leaves(what: str, code: int, unbuffered: bool) -> None:
    python = [sys.executable, *(["-u"] if unbuffered else []), "-c", TOOL.format(what=what)]
    with subprocess.Popen(python, cwd=REPO, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        process.stdin.close()
        assert (process.wait(timeout=60), process.stderr.read()) == (code, b"")


def test_another_pipe_that_breaks_is_an_error() -> None:
    python = [sys.executable, "-c", TOOL.format(what="raise BrokenPipeError('of a worker')")]
    done = subprocess.run(python, cwd=REPO, input="", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "BrokenPipeError: of a worker" in done.stderr
