"""The lock of a folder: who holds it, who is told what, and that nothing is left of it."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_scale.errors import ConfigError
from moe_scale.train import lock
from moe_scale.train.lock import NAME, alone_in
from tests.ranks import REPO

HOLDER = """
import os, sys, time
from pathlib import Path
from moe_scale.train.lock import alone_in
with alone_in(Path(sys.argv[1]), "another run"):
    if not os.fork():
        print("held, and forked", flush=True)
    time.sleep(1000)
"""


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as refused, alone_in(folder, "another run"):
        pass
    (problem,) = refused.value.problems
    assert problem.where == "output_dir"
    return str(problem)


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with alone_in(folder, "another run") as held:
        assert held is not None
        holder = rf"{folder} is in use by another run, process {os.getpid()} on host {socket.gethostname()}, since "
        assert re.fullmatch(rf"output_dir: {holder}2[0-9-]+ [0-9:]+ UTC; wait for its end", refusal(folder))
        assert refusal(folder), "being refused changes nothing"
    assert os.listdir(tmp_path) == []
    with alone_in(folder, "another run"):
        (folder / "metrics.jsonl").touch()
    assert os.listdir(folder) == ["metrics.jsonl"]


def test_a_holder_that_is_killed_gives_it_back_though_its_child_lives(tmp_path: Path) -> None:
    """As the processes that load data, which notice some seconds later."""
    (tmp_path / NAME).write_text("left by one that was killed")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE, start_new_session=True,
    ) as holder:  # fmt: skip
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held, and forked\n"
            assert f"process {holder.pid} on host" in refusal(tmp_path)
            holder.kill()
            holder.wait()
            with alone_in(tmp_path, "another run") as held:
                assert held is not None
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_another_host_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lock is waited for as long as a file server may keep it; after that its user decides."""
    monkeypatch.setattr(lock, "POLL_S", 0.02)
    monkeypatch.setattr(lock, "LEASE_S", 0.1)
    with alone_in(tmp_path, "another run"):
        (tmp_path / NAME).write_text('{"host": "node17", "process": 5, "since": "then"}')
        told = refusal(tmp_path)
        assert told.endswith(f"; wait for its end, or remove {tmp_path / NAME} if that host is lost for good")
        waits = f"{tmp_path} is in use by another run, process 5 on host node17, since then: waiting 0 seconds"
        assert capsys.readouterr().out.count(waits) == 1, "said once"
        monkeypatch.setattr(lock, "LEASE_S", 20.0)
        waiting = threading.Thread(target=lambda: alone_in(tmp_path, "another run").__enter__())
        waiting.start()
        time.sleep(0.1)
        assert waiting.is_alive()
    waiting.join(timeout=10)
    assert not waiting.is_alive(), "the server has given it back"


def test_no_lock_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone_in(tmp_path, "another run") as held:
        assert held is None
    told = f"note: {tmp_path} has no locks (Operation not supported): another start in it would not be noticed\n"
    assert capsys.readouterr().out == told
    (tmp_path / "file").touch()
    with alone_in(tmp_path / "file" / "below", "another run") as held:
        assert held is None
    assert capsys.readouterr().out == "", "what cannot be written is told of by what is written next"
