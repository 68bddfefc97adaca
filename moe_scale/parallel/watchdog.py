"""Tells which rank is lost or stuck, and ends the others instead of letting them wait for it.

A thread of each rank reports to a small store of rank 0, every two seconds, the step and phase that the rank is in. A
rank whose reports stop has died; one whose step and phase stand still is stuck in them. Either way rank 0 says so in
one message and all ranks leave. If rank 0 itself is lost its store is too, and rank 1 speaks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

EXIT_LOST = 1
BEAT_S = 2.0
SILENT_S = 20.0
"""A rank that has not reported for so long is lost."""

SILENT_AFTER_AN_ERROR_S = 5.0
"""The same once a collective has failed, which makes it likely."""

_VERDICT = "verdict"


@dataclass
class _Report:
    """The last words of a rank, and when they came, by the clock of who reads them."""

    beat: int = -1
    came: float = 0.0
    text: str = ""


class Watchdog:
    """Watches over the ranks of a job, as a context manager. All ranks make and enter one together.

    Args:
        hang_s: seconds without a new step or phase after which a rank counts as stuck.
    """

    def __init__(self, hang_s: float):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.hang_s = hang_s
        self._step, self._phase, self._since = 0, "start", time.monotonic()
        self._stopping = threading.Event()
        self._failed = threading.Event()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._store = self._make_store()

    def at(self, step: int, phase: str) -> None:
        """Say what this rank is about to do."""
        self._step, self._phase, self._since = step, phase, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop watching. After an error in a collective, first give the one who speaks the time to say who is lost."""
        if self._thread is None:
            return
        if kind is not None and issubclass(kind, RuntimeError):
            self._failed.set()
            self._over.wait(timeout=SILENT_AFTER_AN_ERROR_S + 4 * BEAT_S)
        self._stopping.set()
        self._thread.join(timeout=3 * BEAT_S)

    def _make_store(self) -> dist.TCPStore | None:
        if self.world_size == 1:
            return None
        address: list[str | int | None] = [None, None]
        store, patience = None, timedelta(seconds=30)
        if self.rank == 0:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            address = [host, store.port]
        dist.broadcast_object_list(address)
        if store is None:
            host, port = str(address[0]), int(str(address[1]))
            store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        store.set(_key(self.rank), self._words(0))
        dist.barrier()  # from here on every key can be read without waiting
        return store

    def _words(self, beat: int) -> str:
        still = time.monotonic() - self._since
        where = f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}"
        return json.dumps([beat, f"{where}: step {self._step}, {self._phase}, for {still:.0f} s"])

    def _watch(self) -> None:
        store = self._store
        assert store is not None
        reports = [_Report(came=time.monotonic()) for _ in range(self.world_size)]
        beat = 0
        while not self._stopping.wait(BEAT_S):
            beat += 1
            try:
                store.set(_key(self.rank), self._words(beat))
                if time.monotonic() - self._since > self.hang_s:
                    store.set(_VERDICT, f"no progress for {self.hang_s / 60:g} minutes")
                if self.rank == 0:
                    self._read(store, reports)
                    self._judge(store, reports)
                elif store.check([_VERDICT]):
                    self._leave("")
            except Exception as error:
                if self._stopping.is_set():
                    return
                if self.rank == 0:
                    raise
                text = f"error: rank 0 is lost: its store does not answer ({str(error).splitlines()[0]})"
                self._leave(text if self.rank == 1 else "")

    def _read(self, store: dist.TCPStore, reports: list[_Report]) -> None:
        words = store.multi_get([_key(rank) for rank in range(self.world_size)])
        for report, raw in zip(reports, words, strict=True):
            beat, text = json.loads(raw)
            if beat != report.beat:
                report.beat, report.came, report.text = beat, time.monotonic(), text

    def _judge(self, store: dist.TCPStore, reports: list[_Report]) -> None:
        patience = SILENT_AFTER_AN_ERROR_S if self._failed.is_set() else SILENT_S
        now = time.monotonic()
        lost = [report.text for report in reports if now - report.came > patience]
        if lost:
            store.set(_VERDICT, "lost")
            self._leave("".join(f"error: lost {text} before it fell silent\n" for text in lost).rstrip())
        elif store.check([_VERDICT]):
            why = store.get(_VERDICT).decode()
            listed = "".join(f"\n  {report.text}" for report in reports)
            self._leave(f"error: {why}; all ranks stop. Where they were:{listed}")

    def _leave(self, text: str) -> None:
        if text:
            print(text, file=sys.stderr, flush=True)
        self._over.set()
        # The main thread may be inside a collective that never returns. Rank 0 holds the store that the others read.
        time.sleep(3 * BEAT_S if self.rank == 0 else 0.5)
        os._exit(EXIT_LOST)


def _key(rank: int) -> str:
    return f"rank {rank}"
