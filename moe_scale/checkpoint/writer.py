"""Write one rank's part of a checkpoint, and join the parts of all ranks to an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moe_scale.checkpoint.files import DamagedCheckpointError, TensorFile, read_json, write_json, write_tensors
from moe_scale.checkpoint.index import WEIGHT, Fragment, StoredTensor, checksums_of, key_of, tiles


class Piece(NamedTuple):
    """A stretch of a flattened logical tensor, or of one of its moments, with its values.

    Attributes:
        tensor, shape: name and shape of the logical tensor.
        state: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
        start: the stretch's first element in the flattened tensor.
        values: 1-D; uint8 codes for an 8-bit moment.
        scales, in_block: of an 8-bit moment, see :class:`moe_scale.checkpoint.index.Fragment`.
    """

    tensor: str
    shape: tuple[int, ...]
    state: str
    start: int
    values: Tensor
    scales: Tensor | None = None
    in_block: int = 0


@dataclass
class Part:
    """What one rank wrote: its fragments, its files with their sizes in bytes, and the file of its own state."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    rank_file: str = ""
    rank_checksum: str = ""


def write_part(
    folder: Path, pieces: Iterable[Piece], own: Mapping[str, Any] | None, *, rank: int, world_size: int
) -> Part:
    """Write this rank's tensors and its own state, read them back, and say what is where.

    Args:
        own: what the rank alone has to save; None for no such file.

    Raises:
        OSError: when the disk is full, say.
        DamagedCheckpointError: when what is read back is not what was written.
    """
    suffix = f"{rank + 1:05d}-of-{world_size:05d}"
    part, files = Part(), {"model": {}, "optimizer": {}}  # type: tuple[Part, dict[str, dict[str, Tensor]]]
    placed: list[tuple[Piece, str]] = []
    for piece in pieces:
        kind = "model" if piece.state == WEIGHT else "optimizer"
        placed.append((piece, f"{kind}-{suffix}.safetensors"))
        for key, values in _stored_under(piece):
            files[kind][key] = values
    checksums: dict[str, str] = {}
    for kind, tensors in files.items():
        if tensors:
            path = folder / f"{kind}-{suffix}.safetensors"
            checksums |= write_tensors(path, tensors)
            part.sizes[path.name] = path.stat().st_size
    for piece, file in placed:
        keys = [key for key, _ in _stored_under(piece)]
        fragment = Fragment(
            file,
            piece.start,
            piece.values.numel(),
            checksums[keys[0]],
            checksums[keys[1]] if len(keys) > 1 else "",
            piece.in_block,
        )
        stored = part.tensors.setdefault(piece.tensor, StoredTensor(piece.shape, {}))
        stored.states.setdefault(piece.state, []).append(fragment)
    if own is not None:
        part.rank_file = f"rank-{suffix}.json"
        part.rank_checksum = write_json(folder / part.rank_file, own)
    _read_back(folder, part)
    return part


def join(parts: Iterable[Part], folder: Path) -> tuple[dict[str, StoredTensor], dict[str, int], dict[str, str]]:
    """The ``tensors``, ``sizes`` and ``ranks`` of the index of all ranks' parts.

    Raises:
        DamagedCheckpointError: if together they do not hold every element of every tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    sizes: dict[str, int] = {}
    ranks: dict[str, str] = {}
    for part in parts:
        sizes |= part.sizes
        if part.rank_file:
            ranks[part.rank_file] = part.rank_checksum
        for name, stored in part.tensors.items():
            joined = tensors.setdefault(name, StoredTensor(stored.shape, {}))
            for state, fragments in stored.states.items():
                joined.states.setdefault(state, []).extend(fragments)
    for name, stored in tensors.items():
        for state, fragments in stored.states.items():
            fragments.sort(key=lambda fragment: fragment.start)
            if not tiles(fragments, stored.numel):
                raise DamagedCheckpointError(folder, f"the ranks did not write all of {state} of {name}")
    return tensors, sizes, ranks


def _stored_under(piece: Piece) -> Iterable[tuple[str, Tensor]]:
    """(key, values) of what a file holds of a piece. A piece that is all of its tensor keeps the tensor's shape."""
    numel = StoredTensor(piece.shape, {}).numel
    fragment = Fragment("", piece.start, piece.values.numel(), "")
    values = piece.values.view(piece.shape) if piece.values.numel() == numel else piece.values
    yield key_of(piece.tensor, piece.state, fragment, numel), values
    if piece.scales is not None:
        yield key_of(piece.tensor, piece.state, fragment, numel, scales=True), piece.scales


def _read_back(folder: Path, part: Part) -> None:
    files = {name: TensorFile(folder / name) for name in part.sizes}
    for name, stored in part.tensors.items():
        for state, fragments in stored.states.items():
            for fragment in fragments:
                for key, checksum in checksums_of(name, state, fragment, stored.numel):
                    files[fragment.file].check(key, checksum)
    if part.rank_file:
        read_json(folder / part.rank_file, part.rank_checksum)
