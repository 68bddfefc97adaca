"""``index.json``: what a checkpoint holds and where."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_scale.checkpoint.files import (
    DamagedCheckpointError,
    TensorFile,
    UnreadableCheckpointError,
    cannot_read,
    read_json,
    write_json,
)
from moe_scale.errors import Problem

FORMAT = 2
"""Of this release. Format 1 were DeepSpeed's own files."""

INDEX = "index.json"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = 256
"""Elements that share a scale in 8-bit moments."""


class Fragment(NamedTuple):
    """A stretch of a flattened tensor, or of one of its moments.

    8-bit moments (codes of a table, times a scale for each block of 256) come with the scales of the blocks that the
    stretch touches; ``in_block`` is the place of its first element in the first of them.
    """

    file: str
    start: int
    length: int
    checksum: str
    scales_checksum: str = ""
    in_block: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor: its shape, and the stretches of its weight and of each moment, in order."""

    shape: tuple[int, ...]
    states: dict[str, list[Fragment]]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``.

    Attributes:
        step, tokens: optimizer steps done, and tokens seen over all ranks.
        kind: of the model, for :func:`moe_scale.models.build.build_model`.
        settings: of the run, nested as in a YAML file.
        layout: how the run was spread: ranks, ep_size, zero_stage, backend, precision.
        optimizer: its name, steps, steps of the schedule, loss scaler; the tables of 8-bit codes.
        scores: the best held-out scores so far, and where.
        tensors: by logical name.
        sizes: bytes of every tensor file.
        ranks: name and checksum of each rank's own file.
    """

    step: int
    tokens: int
    kind: str
    settings: dict[str, Any]
    layout: dict[str, Any]
    optimizer: dict[str, Any]
    scores: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(repr=False)
    sizes: dict[str, int]
    ranks: dict[str, str]

    def write(self, folder: Path) -> None:
        write_json(folder / INDEX, {"format": FORMAT, **asdict(self)})


def key_of(name: str, state: str, fragment: Fragment, numel: int, *, scales: bool = False) -> str:
    """What a fragment is called in its file."""
    prefix = "" if state == WEIGHT else f"{state}.scales/" if scales else f"{state}/"
    whole = fragment.length == numel
    return prefix + (name if whole else f"{name}[{fragment.start}:{fragment.start + fragment.length}]")


def read_index(folder: Path) -> Index:
    """Read and check the index; see that every file that it names is there and as long as it was.

    Raises:
        DamagedCheckpointError: with what is wrong, and where.
        UnreadableCheckpointError: if it may be intact, but not for this release or at this moment.
    """
    path = folder / INDEX
    content = read_json(path)
    written_by = content.pop("format", None)
    if isinstance(written_by, int) and written_by > FORMAT:
        what = f"format {written_by}, newer than {FORMAT}"
        raise UnreadableCheckpointError(Problem(str(path), what, "install a newer moe_scale"))
    try:
        tensors = {name: _stored(tensor) for name, tensor in content.pop("tensors").items()}
        index = Index(tensors=tensors, **content)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DamagedCheckpointError(path, "not an index of this project") from None
    for name, tensor in index.tensors.items():
        for state, fragments in tensor.states.items():
            if not tiles(fragments, tensor.numel):
                raise DamagedCheckpointError(path, f"{state} of {name} is incomplete")
    for name, size in index.sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise cannot_read(folder / name, error) from None
        if found != size:
            raise DamagedCheckpointError(folder / name, f"damaged: {found:,} bytes of {size:,}")
    for name in index.ranks:
        if not (folder / name).is_file():
            raise DamagedCheckpointError(folder / name, "missing")
    return index


def verify(folder: Path, index: Index, *, part: int = 0, parts: int = 1) -> None:
    """Read every part-th file and compare the checksums.

    Raises:
        DamagedCheckpointError: at the first file that is not what was written.
    """
    by_file: dict[str, list[tuple[str, str]]] = {name: [] for name in index.sizes}
    for name, tensor in index.tensors.items():
        for state, fragments in tensor.states.items():
            for fragment in fragments:
                by_file[fragment.file] += checksums_of(name, state, fragment, tensor.numel)
    for place, (file_name, tensors) in enumerate(sorted(by_file.items())):
        if place % parts == part:
            file = TensorFile(folder / file_name)
            for key, checksum in tensors:
                file.check(key, checksum)
    for place, (file_name, checksum) in enumerate(sorted(index.ranks.items())):
        if place % parts == part:
            read_json(folder / file_name, checksum)


def checksums_of(name: str, state: str, fragment: Fragment, numel: int) -> Iterable[tuple[str, str]]:
    """(key, checksum) of what is stored of a fragment."""
    yield key_of(name, state, fragment, numel), fragment.checksum
    if fragment.scales_checksum:
        yield key_of(name, state, fragment, numel, scales=True), fragment.scales_checksum


def _stored(content: dict[str, Any]) -> StoredTensor:
    states = {state: [Fragment(*fragment) for fragment in found] for state, found in content["states"].items()}
    return StoredTensor(tuple(content["shape"]), states)


def tiles(fragments: list[Fragment], numel: int) -> bool:
    """Whether the fragments, in order, cover the tensor without a gap."""
    end = 0
    for fragment in fragments:
        if fragment.start != end:
            return False
        end += fragment.length
    return end == numel
