"""A directory that ``save_pretrained`` of Hugging Face transformers wrote, or that is written like one of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_scale.errors import ConfigError, Problem

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""Bytes of a file of weights, about; one tensor may be larger."""

FLOATS = ("F64", "F32", "BF16", "F16")
"""Kinds of numbers that weights may have, as safetensors names them; others are quantized."""


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor before it is read: which file, its shape, and its kind of number."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Directory:
    """A directory's settings and tensors, the latter read when they are asked for.

    Args:
        path: the directory.
        where: what named it, for messages.

    Raises:
        ConfigError: if it has no settings or weights; from every method, if what is there cannot be read.
    """

    def __init__(self, path: Path, where: str):
        self.path, self.where = path, where
        if not (path / CONFIG).is_file():
            raise self._problem(f"{path} has no {CONFIG}", "name a directory that save_pretrained wrote")
        self.headers = dict(self._headers())

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self.headers)

    def tensor(self, name: str) -> Tensor:
        """A tensor in the precision that it is stored in."""
        try:
            with safe_open(self.headers[name].file, framework="pt") as file:
                found: Tensor = file.get_tensor(name)
                return found
        except KeyError:
            raise self._problem(f"{self.path} has no tensor {name}", "is it all of one model?") from None
        except (OSError, SafetensorError) as error:
            raise self._problem(f"{self.headers[name].file} cannot be read: {error}") from None

    def is_zero(self, name: str) -> bool:
        """Whether a tensor is there and holds nothing but zeros."""
        return name in self.headers and not bool(self.tensor(name).any())

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors are there and hold the same numbers."""
        return {one, other} <= self.names and torch.equal(self.tensor(one), self.tensor(other))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings with all defaults of the kind of model, which are those of transformers."""
        from transformers import AutoConfig

        try:
            found: dict[str, Any] = AutoConfig.from_pretrained(self.path, local_files_only=True).to_dict()
        except Exception as error:  # OSError, ValueError, KeyError, and what validators of settings raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            why = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])  # the second one says what of the field
            raise self._problem(f"{self.path / CONFIG} cannot be read ({why})") from error
        return found

    def _headers(self) -> Iterator[tuple[str, Header]]:
        """Of each tensor what is said of it."""
        names: Iterable[str] = [WEIGHTS]
        index = self.path / INDEX
        if not (self.path / WEIGHTS).exists() and index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                if wrong := [name for name in names if Path(name).name != name]:
                    raise ValueError(f"{wrong[0]!r} is no name of a file beside it")
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise self._problem(f"{index} cannot be read ({error})") from None
        for file in (self.path / name for name in names):
            if not file.is_file():
                what = f"{self.path} has no {file.name}"
                raise self._problem(what, f"weights have to be in {WEIGHTS}, or in the files that {INDEX} names")
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        said = opened.get_slice(name)
                        yield name, Header(file, tuple(said.get_shape()), str(said.get_dtype()))
            except (OSError, SafetensorError) as error:
                raise self._problem(f"{file} cannot be read: {error}") from None

    def _problem(self, what: str, allowed: str = "") -> ConfigError:
        return ConfigError(Problem(self.where, what, allowed, this_host_only=True))


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write named tensors into one file, or into several with an index. Returns the bytes of all of them.

    No more than one file's tensors are in memory at once.

    Raises:
        OSError: when the disk is full, say.
    """
    names: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        save_file(held, folder / f"{len(names)}.safetensors", metadata={"format": "pt"})
        names.append(list(held))

    for name, tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if held and size + tensor_bytes > SHARD_BYTES:
            write()
            held, size = {}, 0
        # A copy of its own: parts of one tensor share their memory, which the format refuses.
        held[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        size, total = size + tensor_bytes, total + tensor_bytes
    write()
    if len(names) == 1:
        (folder / "0.safetensors").rename(folder / WEIGHTS)
        return total
    where: dict[str, str] = {}
    for number, in_file in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        where |= dict.fromkeys(in_file, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
