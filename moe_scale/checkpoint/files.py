"""Files of a checkpoint: tensors and JSON whose damage is noticed.

Tensors are in the safetensors format. Its library writes a file from a dictionary, with a copy of all of it in
memory; here one tensor at a time is written, hashed and let go. Files are read by ranges, of which a rank needs a few.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from moe_scale.errors import ConfigError, Problem

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 1 << 30


class DamagedCheckpointError(ConfigError):
    """A checkpoint is incomplete or not what was written. Nothing of it must be used."""

    def __init__(self, path: Path, what: str, allowed: str = ""):
        super().__init__(Problem(str(path), what, allowed, this_host_only=True))

    def __reduce__(self) -> Any:  # the constructor takes other arguments than the base class keeps
        return ConfigError, (self.problems,)


class UnreadableCheckpointError(ConfigError):
    """A checkpoint cannot be used here and now, and may be intact all the same: it must not be passed over."""


def cannot_read(path: Path, error: OSError) -> ConfigError:
    """What a failure to read means: a file that is not there is damage, anything else may pass."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return DamagedCheckpointError(path, f"cannot be read: {error.strerror}")
    what = f"cannot be read: {error.strerror}"
    return UnreadableCheckpointError(Problem(str(path), what, "mend that, or move the folder away", True))


def write_json(path: Path, content: Mapping[str, Any]) -> str:
    """Write JSON with its own checksum, and wait until it is on the disk. Returns the checksum."""
    checksum = _json_checksum(content)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"checksum": checksum, "content": content}, file)
        _to_disk(file)
    return checksum


def read_json(path: Path, checksum: str | None = None) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Args:
        checksum: the one that another file says it has.

    Raises:
        DamagedCheckpointError: if the file is missing, unreadable or not what was written.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        content, own = stored["content"], stored["checksum"]
        whole = isinstance(content, dict) and own == _json_checksum(content) and checksum in (None, own)
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedCheckpointError(path, "damaged: it is not what was written")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write a safetensors file, one tensor in memory at a time. Returns the checksum of each tensor's bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            content = _bytes_of(tensor.detach().cpu().contiguous())
            checksums[name] = xxhash.xxh3_128_hexdigest(content)
            file.write(content)
        _to_disk(file)
    return checksums


class Entry(NamedTuple):
    """Where a tensor is in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first_byte: int
    last_byte: int


class TensorFile:
    """A safetensors file, read by ranges.

    Raises:
        DamagedCheckpointError: from every method, if the file is not what its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                    raise ValueError
                self.entries = dict(_entries(json.loads(file.read(length)), 8 + length, size))
        except OSError as error:
            raise cannot_read(path, error) from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DamagedCheckpointError(path, "damaged: it has no valid header") from None

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Elements ``first`` to ``first + count`` of a flattened tensor."""
        entry = self._entry(name)
        count = math.prod(entry.shape) - first if count is None else count
        start, size = entry.first_byte + first * entry.dtype.itemsize, max(count, 0) * entry.dtype.itemsize
        if first < 0 or start + size > entry.last_byte:
            raise DamagedCheckpointError(self.path, f"{name} has no elements {first} to {first + count}")
        # Bytes of numpy: where ZeRO-3 builds a model, torch.empty makes a tensor of the training precision.
        content = np.empty(size, dtype=np.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                target = content.data
                while target:
                    got = file.readinto(target)
                    if not got:
                        raise DamagedCheckpointError(self.path, f"ends before the end of {name}")
                    target = target[got:]
        except OSError as error:
            raise cannot_read(self.path, error) from None
        return torch.from_numpy(content).view(entry.dtype)

    def check(self, name: str, checksum: str) -> None:
        """Raise unless the tensor's bytes have the checksum."""
        if xxhash.xxh3_128_hexdigest(_bytes_of(self.read(name))) != checksum:
            raise DamagedCheckpointError(self.path, f"damaged: {name} is not what was written")

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise DamagedCheckpointError(self.path, f"has no tensor {name}")
        return self.entries[name]


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entries(header: dict[str, Any], base: int, size: int) -> Iterable[tuple[str, Entry]]:
    for name, said in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = _DTYPES[said["dtype"]], tuple(said["shape"])
        first, last = (base + offset for offset in said["data_offsets"])
        if not base <= first <= last <= size or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(name)
        yield name, Entry(dtype, shape, first, last)


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _json_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
