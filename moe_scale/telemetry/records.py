"""The record of a run's numbers: ``metrics.jsonl``, and how a record becomes named scalars for the sinks."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

log = logging.getLogger("moe_scale.telemetry")

GROUPS = {
    "loss": "train",
    "lm_loss": "train",
    "perplexity": "train",
    "lr": "train",
    "grad_norm": "train",
    "tokens": "train",
    "flops": "train",
    "loss_scale": "train",
    "epoch": "train",
    "tokens_per_s": "speed",
    "tokens_per_s_per_device": "speed",
    "step_time_s": "speed",
    "mfu": "speed",
    "aux_loss": "moe",
    "z_loss": "moe",
    "entropy": "moe",
    "dropped": "moe",
}
"""Heading that a plain name is shown under; a name with a ``/`` already says its own."""


class JsonLines:
    """Appends JSON objects to a file, one a line, each flushed. A full disk costs records, never the run."""

    def __init__(self, path: Path):
        self.path = path
        self._warned = False
        self._file: FileIO | None = None  # opened by the first record: truncate_after replaces the file before that
        self._separate = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record to the end of the file."""
        line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        start = None
        try:
            if self._file is None:
                # Unbuffered: a write that fails leaves nothing behind that a later flush would raise again.
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - close() closes it
                self._separate = ends_mid_line(self.path)
            line = b"\n" + line if self._separate else line
            start = self._file.seek(0, os.SEEK_END)
            while line:
                line = line[self._file.write(line) :]
            self._separate = False
        except OSError as error:
            # What a full disk took of the line goes again, or the next record would be glued to it.
            if self._file is not None and start is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
            if not self._warned:
                log.warning("records are lost, the run goes on: %s", error)
            self._warned = True

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


def truncate_after(path: Path, step: int, without: str = "") -> None:
    """Rewrite a ``metrics.jsonl`` without the records of steps after ``step``: all of it or, on an error, nothing.

    A line that is no record, such as one that a crash cut short, goes as well; so does a record that has ``without``.
    """
    if not path.exists():
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(path, "rb") as old, os.fdopen(handle, "wb") as new:
            for line in old:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if record["step"] <= step and without not in record:
                        new.write(line.rstrip(b"\n") + b"\n")
            new.flush()
            os.fsync(new.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def flatten(
    values: Mapping[str, Any], layers: Sequence[int] | None = None, prefix: str = ""
) -> Iterator[tuple[str, float]]:
    """Numbers under grouped names: ``loss`` -> ``train/loss``, ``eval_loss`` -> ``eval/loss``, and a list with one
    number a layer, ``moe_entropy`` or ``entropy`` -> ``moe/layer_03/entropy``. Text, None, lists of lists are left out.
    """
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, Mapping):
            yield from flatten(value, layers, name + "/")
        elif isinstance(value, bool | int | float):
            yield group(name), float(value)
        elif isinstance(value, list):
            group_name, _, leaf = group(name, default="moe").rpartition("/")
            for i, item in enumerate(value):
                number = layers[i] if layers and i < len(layers) else i
                if isinstance(item, bool | int | float):
                    yield f"{group_name}/layer_{number:02d}/{leaf}", float(item)


def group(name: str, default: str = "train") -> str:
    """``name`` with its heading."""
    if "/" in name:
        return name
    for prefix in ("eval", "moe", "memory", "time"):
        if name.startswith(prefix + "_"):
            return f"{prefix}/{name[len(prefix) + 1 :]}"
    return f"{GROUPS.get(name, default)}/{name}"


def plain(value: Any) -> Any:
    """``value`` in Python's own types: numpy and torch scalars and arrays, paths and the like are converted."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalar (a number) and array (a list) alike
        return plain(value.detach().tolist() if hasattr(value, "detach") else value.tolist())
    return str(value)


def finite(value: Any) -> Any:
    """``value`` with None for NaN and the infinities, which JSON does not have."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value


def ends_mid_line(path: Path) -> bool:
    """Whether the file's last line lacks its end, as after a crash."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def keep_earlier_metrics(run_dir: Path) -> None:
    """Set a metrics file aside, under the first free number, that a start from the beginning would empty."""
    path = run_dir / "metrics.jsonl"
    if path.exists() and path.stat().st_size:
        number = next(n for n in itertools.count(1) if not (run_dir / f"metrics.{n}.jsonl").exists())
        path.rename(run_dir / f"metrics.{number}.jsonl")
