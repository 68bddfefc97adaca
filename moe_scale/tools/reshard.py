"""``moe-scale reshard``: write a checkpoint anew, in another number of files or with the weights alone.

Training needs none of this: a checkpoint opens on any number of ranks as it is. It is for archives, and for programs
that read one safetensors file.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import WEIGHT, Index, read_index, verify
from moe_scale.checkpoint.reader import Reader
from moe_scale.checkpoint.writer import Piece, join, write_part
from moe_scale.errors import ConfigError, Problem
from moe_scale.tools.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("source", help="a checkpoint, or a run, which means its newest one")
    parser.add_argument("target", help="folder that becomes the new checkpoint; it must not exist")
    parser.add_argument("--files", type=positive, default=1, help="files of weights, at most [%(default)s]")
    parser.add_argument("--weights_only", action="store_true", help="leave the optimizer's moments out")


def run(arguments: argparse.Namespace) -> Path:
    """Write the new checkpoint. It opens like any other; without moments, for :func:`moe_scale.load_model` alone.

    Raises:
        ConfigError: if the source is damaged or the target is there already; nothing is written then.
    """
    target = Path(arguments.target).expanduser()
    if target.exists():
        raise ConfigError(Problem("target", f"{target} exists", "name a new folder"))
    source = folders.find_checkpoint(Path(arguments.source).expanduser())
    index = read_index(source)
    verify(source, index)
    partial = folders.partial_of(target)
    try:
        folders.begin(target)
        size = _write(partial, Reader(source, index), arguments.files, weights_only=arguments.weights_only)
        partial.rename(target)
    except OSError as error:
        raise ConfigError(Problem(str(target), f"cannot be written: {error.strerror}")) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {target}: step {index.step}, {size / 1e6:,.1f} MB")
    return target


def _write(partial: Path, reader: Reader, files: int, *, weights_only: bool) -> int:
    """Write everything into the folder, and check it. Returns the bytes of all tensors."""
    index = reader.index
    shares = _shares(index, files)
    parts = [
        write_part(
            partial,
            _pieces(reader, names, weights_only=weights_only),
            None,
            rank=number,
            world_size=len(shares),
        )
        for number, names in track(list(enumerate(shares)), description="writing")
    ]
    tensors, sizes, _ = join(parts, partial)
    for name in index.ranks:  # still those of the ranks that saved them
        shutil.copyfile(reader.folder / name, partial / name)
    optimizer = index.optimizer | {"tables": {}}  # 8-bit moments are written as the numbers that they stand for
    dataclasses.replace(index, tensors=tensors, sizes=sizes, optimizer=optimizer).write(partial)
    verify(partial, read_index(partial))
    return sum(sizes.values())


def _shares(index: Index, files: int) -> list[list[str]]:
    """Names of the tensors of each file: about equally many elements, and no file without a tensor."""
    share = sum(tensor.numel for tensor in index.tensors.values()) / files
    names: list[list[str]] = [[] for _ in range(files)]
    passed = 0
    for name, tensor in index.tensors.items():
        names[int((passed + tensor.numel / 2) // share)].append(name)  # where the tensor's middle falls into
        passed += tensor.numel
    return [some for some in names if some]


def _pieces(reader: Reader, names: list[str], *, weights_only: bool) -> Iterator[Piece]:
    for name in names:
        tensor = reader.index.tensors[name]
        for state in tensor.states:
            if state == WEIGHT or not weights_only:
                yield Piece(name, tensor.shape, state, 0, reader.read(name, state, 0, tensor.numel))
