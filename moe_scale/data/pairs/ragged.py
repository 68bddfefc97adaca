"""Rows of unequal length in two flat files: all elements, and where each row starts."""

from __future__ import annotations

import array
from pathlib import Path
from types import TracebackType

import numpy as np


class RaggedWriter:
    """Appends rows to ``<path>.bin``; closing writes ``<path>_starts.npy``, [rows + 1] int64."""

    def __init__(self, path: Path, dtype: str):
        self.path = path
        self.dtype = dtype
        self._file = open(path.with_name(path.name + ".bin"), "wb")  # noqa: SIM115 (closed by close)
        self._starts = array.array("q", [0])

    def append(self, row: list[int] | np.ndarray | bytes) -> bytes:
        """Add a row; returns its bytes, as they are on disk."""
        written = row if isinstance(row, bytes) else np.asarray(row, dtype=self.dtype).tobytes()
        self._file.write(written)
        self._starts.append(self._starts[-1] + len(row))
        return written

    def close(self) -> None:
        self._file.close()
        np.save(self.path.with_name(self.path.name + "_starts.npy"), np.asarray(self._starts, dtype=np.int64))

    def __enter__(self) -> RaggedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Ragged:
    """The rows that a :class:`RaggedWriter` wrote, read in place.

    Attributes:
        flat: all elements.
        starts: first element of each row and, last, the end: [rows + 1] int64.
    """

    def __init__(self, path: Path, dtype: str):
        """Map the files into memory; a ValueError when they do not fit each other."""
        self.starts = np.load(path.with_name(path.name + "_starts.npy"))
        flat = path.with_name(path.name + ".bin")
        # An empty file cannot be mapped.
        self.flat = np.memmap(flat, dtype=dtype, mode="r") if flat.stat().st_size else np.empty(0, dtype=dtype)
        if len(self.flat) != self.starts[-1]:
            raise ValueError(f"{flat.name} has {len(self.flat)} elements, not {self.starts[-1]}")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64."""
        return np.diff(self.starts)
