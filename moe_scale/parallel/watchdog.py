"""Tells which rank is lost, stuck or failed, and ends the others instead of letting them wait for it.

Every rank keeps a connection to rank 0, and a thread of it says every two seconds what the rank is doing. A connection
that breaks without a farewell belonged to a rank that died: the kernel closes it at once, and finds out by itself when
the other host is gone. It also answers for a process that is only busy, so that a rank which does not come round to its
thread (a library holds Python's lock, say) is never called lost. A rank whose step and phase stand still for very long
is stuck in them. In each case rank 0 says so in one message, and all ranks leave. If rank 0 itself is lost, the first
ranks that are left say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moe_scale.errors import ConfigError, StoppedError
from moe_scale.parallel.collectives import host_group

EXIT_LOST = 1
BEAT_S = 2.0
SETTLE_S = 3.0
"""A rank that dies makes others fail: after a failure, how long to wait for its cause to show."""

SILENT_HOST_S = 30
"""A host whose kernel does not answer for so long is gone."""

CONNECT_S = 60.0
LAST_WORDS_S = 2.0


@dataclass
class _Rank:
    """What rank 0 knows of a rank.

    Attributes:
        name: rank, host and process.
        at: step and phase.
        moved: when the rank came there, by rank 0's clock.
        state: ``running``, ``done`` (said farewell), ``failed`` (said why) or ``lost``.
        why: of a failure, or of the loss.
    """

    name: str
    at: str = "start"
    moved: float = float("inf")
    state: str = "running"
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name}, {self.at}"


class _Line:
    """Messages over a connection, each a line of JSON. Sending to one who is gone does nothing."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._received = b""
        self._sending = threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", SILENT_HOST_S // 3),
            ("TCP_KEEPINTVL", SILENT_HOST_S // 6),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 1000 * SILENT_HOST_S),
        ):
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, waiting for the first bytes; None at the end."""
        try:
            came = self.connection.recv(1 << 16)
            *whole, self._received = (self._received + came).split(b"\n")
            return [json.loads(line) for line in whole] if came else None
        except (OSError, ValueError):
            return None

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Watchdog:
    """Watches over the ranks of a job, as a context manager. All ranks make and enter one together.

    An error that all ranks raise together (:class:`StoppedError`, :class:`ConfigError`), and an interrupt, is a
    farewell. After any other, the rank waits inside the context until it is clear whether a lost rank was the cause.

    Args:
        hang_s: seconds without a new step or phase after which a rank counts as stuck.

    Attributes:
        last_words: is called with what there is to say before this process is ended.
    """

    last_words: Callable[[str], Any] | None = None

    def __init__(self, hang_s: float):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.hang_s = hang_s
        self._me = _Rank(f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}")
        self._stopping = threading.Event()
        self._judged = threading.Event()
        self._ranks = {self.rank: self._me}
        self._lines: dict[int, _Line] = {}  # rank 0: to the others; another rank: to rank 0
        self._connect()
        dist.barrier(group=host_group())  # nobody reports before rank 0 knows all

    def at(self, step: int, phase: str, *, timed: bool = True) -> None:
        """Say what this rank is about to do. What is not ``timed`` may take for ever, as making data ready may."""
        self._me.at, self._me.moved = f"step {step}: {phase}", time.monotonic() if timed else float("inf")

    def progressed(self) -> None:
        """Say that this rank gets on with what it is about, where one phase may take longer than ``hang_s``."""
        self._me.moved = max(self._me.moved, time.monotonic())

    def __enter__(self) -> Watchdog:
        watch = self._watch_all if self.rank == 0 else self._report
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        together = (StoppedError, ConfigError, KeyboardInterrupt)
        if kind is not None and not issubclass(kind, together):
            self._me.state, self._me.why = "failed", _brief(kind, error)
            if self.rank != 0:
                self._lines[0].send(failed=self._me.why)
            self._judged.wait(timeout=2 * SETTLE_S + BEAT_S)
        self._stopping.set()
        self._send_all(done=True)
        for line in self._lines.values():
            if self.rank != 0:
                line.end()  # wakes the thread

    def _connect(self) -> None:
        if self.world_size == 1:
            return
        address: list[Any] = [None]
        if self.rank == 0:
            listener = socket.create_server(("", 0), backlog=self.world_size)
            address = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), listener.getsockname()[1])]
        dist.broadcast_object_list(address, group=host_group())
        if self.rank != 0:
            line = _Line(socket.create_connection(tuple(address[0]), timeout=CONNECT_S))
            line.connection.settimeout(None)
            line.send(rank=self.rank, name=self._me.name)
            self._lines[0] = line
            return
        with listener:
            listener.settimeout(CONNECT_S)
            while len(self._lines) < self.world_size - 1:
                line = _Line(listener.accept()[0])
                line.connection.settimeout(CONNECT_S)
                while (hellos := line.receive()) == []:
                    pass  # the rest of a line is still to come
                line.connection.settimeout(None)
                for hello in hellos or []:
                    self._lines[hello["rank"]] = line
                    self._ranks[hello["rank"]] = _Rank(hello["name"])

    def _send_all(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)

    # Ranks other than 0

    def _report(self) -> None:
        line, selector = self._lines[0], selectors.DefaultSelector()
        selector.register(line, selectors.EVENT_READ)
        while not self._stopping.is_set():
            moved = self._me.moved
            line.send(at=self._me.at, still=time.monotonic() - moved if moved < float("inf") else None)
            if selector.select(timeout=BEAT_S):
                messages = line.receive()
                if messages is None and not self._stopping.is_set():
                    self._leave("error: rank 0 is lost: it died, or its host did; all ranks stop")
                for message in messages or []:
                    if "verdict" in message and self.rank not in message["verdict"]:
                        self._leave("")
                    self._judged.set()  # or rank 0 is done, and all are about to be
                    self._stopping.set()
            elif time.monotonic() - self._me.moved > self.hang_s + SILENT_HOST_S:
                self._leave(f"error: no progress for {self.hang_s / 60:g} minutes, and rank 0 does not say a word")

    # Rank 0

    def _watch_all(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, line in self._lines.items():
            selector.register(line, selectors.EVENT_READ, rank)
        failed_at = 0.0
        while not self._stopping.is_set():
            for key, _ in selector.select(timeout=BEAT_S / 2):
                if not self._hear(self._ranks[key.data], self._lines[key.data]):
                    selector.unregister(key.fileobj)
            if not failed_at and self._in_state("failed"):
                failed_at = time.monotonic()
            settled = failed_at and time.monotonic() - failed_at > SETTLE_S
            if self._in_state("lost"):
                self._judge_lost()
            elif settled or (failed_at and not self._in_state("running")):
                self._judge_failed()
            elif any(time.monotonic() - rank.moved > self.hang_s for rank in self._in_state("running")):
                self._judge_stuck()

    def _hear(self, rank: _Rank, line: _Line) -> bool:
        """Take in what a rank says. False when it will say no more."""
        messages = line.receive()
        for message in messages or []:
            if "at" in message:
                rank.at, still = message["at"], message["still"]
                rank.moved = float("inf") if still is None else time.monotonic() - still
            elif "failed" in message:
                rank.state, rank.why = "failed", message["failed"]
            elif rank.state == "running":
                rank.state = "done"
        if messages is None and rank.state == "running":
            rank.state = "lost"
        return messages is not None

    def _in_state(self, state: str) -> list[_Rank]:
        return [rank for _, rank in sorted(self._ranks.items()) if rank.state == state]

    def _judge_lost(self) -> None:
        time.sleep(BEAT_S / 4)  # of a host that is gone, all ranks
        lost = "; ".join(map(str, self._in_state("lost")))
        self._send_all(verdict=[])
        self._leave(f"error: lost {lost} when last heard of: it died, or its host did; all ranks stop")

    def _judge_failed(self) -> None:
        """Those who failed say so themselves, with a stack trace; the others leave."""
        failed = self._in_state("failed")
        self._send_all(verdict=[number for number, rank in self._ranks.items() if rank in failed])
        self._judged.set()
        self._stopping.set()
        if self._me not in failed:
            self._leave("".join(f"error: {rank} failed: {rank.why}; all ranks stop\n" for rank in failed).rstrip())

    def _judge_stuck(self) -> None:
        now = time.monotonic()
        listed = "".join(
            f"\n  {rank}" + (f", for {now - rank.moved:.0f} s" if rank.moved <= now else "")
            for _, rank in sorted(self._ranks.items())
        )
        self._send_all(verdict=[])
        self._leave(f"error: no progress for {self.hang_s / 60:g} minutes; all ranks stop. Where they were:{listed}")

    def _leave(self, text: str) -> None:
        """End this process, whose main thread may be inside a collective that never returns."""
        first = self.rank in (0, 1) or os.environ.get("LOCAL_RANK") == "0"
        if text and first:
            print(text, file=sys.stderr, flush=True)
        if self.last_words:  # in a thread, because they may be for a disk that is gone with its host
            words = threading.Thread(target=self._say, args=(text or "all ranks stop: rank 0 says why",), daemon=True)
            words.start()
            words.join(timeout=LAST_WORDS_S)
        os._exit(EXIT_LOST)

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):
            if self.last_words:
                self.last_words(text)


def _brief(kind: type[BaseException], error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{kind.__name__}: {lines[0]}" if lines else kind.__name__
