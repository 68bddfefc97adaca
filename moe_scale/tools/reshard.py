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
from moe_scale.checkpoint.index import WEIGHT, read_index, verify
from moe_scale.checkpoint.reader import Reader
from moe_scale.checkpoint.writer import Piece, join, write_part
from moe_scale.errors import ConfigError, Problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    parser.add_argument("source", help="a checkpoint, or a run, which means its newest one")
    parser.add_argument("target", help="folder that becomes the new checkpoint; it must not exist")
    parser.add_argument("--files", type=int, default=1, help="files of weights, each held in memory once [%(default)s]")
    parser.add_argument("--weights_only", action="store_true", help="leave the optimizer's moments out")


def run(arguments: argparse.Namespace) -> Path:
    """Write the new checkpoint. It opens like any other; without moments, for :func:`moe_scale.load_model` alone.

    Raises:
        ConfigError: if the source is damaged or the target is there already; nothing is written then.
    """
    target = Path(arguments.target).expanduser()
    if arguments.files < 1:
        raise ConfigError(Problem("--files", f"{arguments.files}", "choose at least 1"))
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
    parts = [
        write_part(
            partial,
            _pieces(reader, part, files, weights_only=weights_only),
            None,
            rank=part,
            world_size=files,
        )
        for part in track(range(files), description="writing")
    ]
    tensors, sizes, _ = join(parts, partial)
    for name in index.ranks:  # still those of the ranks that saved them
        shutil.copyfile(reader.folder / name, partial / name)
    optimizer = index.optimizer | {"tables": {}}  # 8-bit moments are written as the numbers that they stand for
    dataclasses.replace(index, tensors=tensors, sizes=sizes, optimizer=optimizer).write(partial)
    verify(partial, read_index(partial))
    return sum(sizes.values())


def _pieces(reader: Reader, part: int, parts: int, *, weights_only: bool) -> Iterator[Piece]:
    """The ``part``-th of ``parts`` equal shares of the tensors' elements, cut at tensors where that is even enough."""
    index = reader.index
    share = sum(tensor.numel for tensor in index.tensors.values()) / parts
    passed = 0
    for name, tensor in index.tensors.items():
        # A tensor belongs to the part that its middle falls into.
        if int((passed + tensor.numel / 2) // share) == part:
            for state in tensor.states:
                if state == WEIGHT or not weights_only:
                    yield Piece(name, tensor.shape, state, 0, reader.read(name, state, 0, tensor.numel))
        passed += tensor.numel
