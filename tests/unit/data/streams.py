"""Local stand-ins for a streamed data set. At module level, because worker processes import them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets


def document(index: int) -> str:
    """A short text that no other index has; about one in five is several times as long."""
    digest = hashlib.sha256(str(index).encode()).hexdigest()
    return f"Document {index}: " + f"{digest[:12]} ünïcode\n" * (6 if digest[0] in "012" else 1)


def documents(count: int, start: int = 0) -> list[str]:
    return [document(i) for i in range(start, start + count)]


def _records(shards: list[range]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for index in shard:
            yield {"text": document(index), "id": index}


def _open(count: int, shards: int) -> datasets.IterableDataset:
    ranges = [range(k, count, shards) for k in range(shards)]
    return datasets.IterableDataset.from_generator(_records, gen_kwargs={"shards": ranges})


def local_source(count: int, shards: int = 1) -> Callable[[], datasets.IterableDataset]:
    """Opens a stream of ``count`` documents."""
    return functools.partial(_open, count, shards)


def record_source(records: list[dict[str, Any]]) -> Callable[[], Any]:
    """Opens a stream of these records, whatever they hold."""
    return functools.partial(_RecordStream, records)


class _RecordStream:
    """The part of ``datasets.IterableDataset`` that is used, for one rank and records of any shape."""

    num_shards = 1
    _distributed = None

    def __init__(self, records: list[dict[str, Any]]):
        self.records = records
        self.at = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < len(self.records):
            self.at += 1
            yield self.records[self.at - 1]

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def _open_flaky(count: int, every: int, log: Path) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(
        _flaky_records, gen_kwargs={"shards": [range(count)], "every": [every], "log": [str(log)]}
    )


def _flaky_records(shards: list[range], every: list[int], log: list[str]) -> Iterator[dict[str, Any]]:
    """Breaks off at every ``every``-th record, once at each; what broke is kept in a file, as processes come and go."""
    broken = Path(log[0])
    for shard in shards:
        for index in shard:
            seen = broken.read_text().split() if index % every[0] == every[0] - 1 and broken.exists() else []
            if index % every[0] == every[0] - 1 and str(index) not in seen:
                broken.write_text(" ".join([*seen, str(index)]))
                raise ConnectionError(f"reset at record {index}")
            yield {"text": document(index), "id": index}


def flaky_source(count: int, every: int, log: Path) -> Callable[[], datasets.IterableDataset]:
    """Opens a stream that raises ``ConnectionError`` the first time it comes to every ``every``-th record."""
    return functools.partial(_open_flaky, count, every, log)
