"""Read any stretch of any tensor of a checkpoint, and whole models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_scale.checkpoint.files import DamagedCheckpointError, TensorFile
from moe_scale.checkpoint.folder import find_checkpoint
from moe_scale.checkpoint.index import BLOCK, WEIGHT, Fragment, Index, key_of, read_index, verify
from moe_scale.models.build import build_model
from moe_scale.models.lora import factor_names, merged


class Codes(NamedTuple):
    """A stretch of an 8-bit moment as it was stored: uint8 codes, fp32 scales, and the first element's place."""

    codes: Tensor
    scales: Tensor
    in_block: int


class Reader:
    """A checkpoint whose files are opened when they are needed.

    Nothing here compares checksums: :func:`moe_scale.checkpoint.index.verify` does, once and before anything is used.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        self._open = functools.cache(lambda name: TensorFile(folder / name))

    def read(self, name: str, state: str, start: int, length: int) -> Tensor:
        """Elements ``start`` to ``start + length`` of a flattened tensor's ``state``; 8-bit moments as fp32."""
        tensor = self.index.tensors[name]
        parts = []
        for fragment in tensor.states[state]:
            first, last = max(start, fragment.start), min(start + length, fragment.start + fragment.length)
            if first >= last:
                continue
            at, count = first - fragment.start, last - first
            values = self._open(fragment.file).read(key_of(name, state, fragment, tensor.numel), at, count)
            if fragment.scales_checksum:
                values = self._decoded(name, state, fragment, values, at)
            parts.append(values)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def codes(self, name: str, state: str, start: int, length: int) -> Codes | None:
        """An 8-bit moment as it was stored, if exactly this stretch was; else None."""
        tensor = self.index.tensors[name]
        for fragment in tensor.states[state]:
            if (fragment.start, fragment.length) == (start, length) and fragment.scales_checksum:
                file = self._open(fragment.file)
                codes = file.read(key_of(name, state, fragment, tensor.numel))
                scales = file.read(key_of(name, state, fragment, tensor.numel, scales=True))
                return Codes(codes, scales, fragment.in_block)
        return None

    def weight(self, name: str) -> Tensor:
        """A whole logical tensor in its shape."""
        tensor = self.index.tensors[name]
        return self.read(name, WEIGHT, 0, tensor.numel).view(tensor.shape)

    def _decoded(self, name: str, state: str, fragment: Fragment, codes: Tensor, at: int) -> Tensor:
        """What the codes of a fragment stand for, the first of which is its element ``at``."""
        first, last = (fragment.in_block + at) // BLOCK, (fragment.in_block + at + len(codes) - 1) // BLOCK
        key = key_of(name, state, fragment, self.index.tensors[name].numel, scales=True)
        scales = self._open(fragment.file).read(key, first, last - first + 1)
        table = torch.tensor(self.index.optimizer["tables"][state], dtype=torch.float32)
        blocks = (torch.arange(len(codes)) + (fragment.in_block + at) % BLOCK) // BLOCK
        return table[codes.long()] * scales[blocks]


class MergedReader(Reader):
    """A checkpoint read as that of a model without adapters: to the weights beside which they stand, they are added."""

    @property
    def names(self) -> list[str]:
        """Of the model's tensors."""
        return [name for name in self.index.tensors if ".lora_" not in name]

    def weight(self, name: str) -> Tensor:
        """A whole logical tensor in its shape; where an adapter was added in fp32."""
        weight, factors = super().weight(name), factor_names(name)
        if factors[0] not in self.index.tensors:
            return weight
        lora = self.index.settings["lora"]
        a, b = (super(MergedReader, self).weight(factor) for factor in factors)
        return merged(weight, a, b, lora["alpha"] / lora["rank"])


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32, dropless: bool = False) -> nn.Module:
    """The model of a checkpoint or a run, on the CPU of this process, in evaluation mode.

    Needs neither DeepSpeed nor a process group, whatever wrote the checkpoint.

    Args:
        path: a checkpoint's folder, or a run's, which means its newest checkpoint.
        dtype: of the parameters. Buffers keep theirs.
        dropless: the experts take every token that is sent to them, also in a model that was trained with a capacity
            (``moe.dispatch``): what becomes of a token then depends on no other.

    Raises:
        ConfigError: if there is no checkpoint, or it is damaged; nothing of it is used then.
    """
    folder = find_checkpoint(Path(path).expanduser())
    index = read_index(folder)
    verify(folder, index)
    settings = index.settings
    if dropless:
        settings = {**settings, "moe": {**settings["moe"], "dispatch": "dropless"}}
    return fill(build_model(index.kind, settings), Reader(folder, index), dtype)


def fill(model: nn.Module, reader: Reader, dtype: torch.dtype) -> nn.Module:
    """Give a model without values (on the meta device) those of a checkpoint."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    buffers = persistent_buffers(model)
    mine = {name: tuple(tensor.shape) for name, tensor in (parameters | buffers).items()}
    theirs = {name: tensor.shape for name, tensor in reader.index.tensors.items()}
    if wrong := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
        what = f"does not fit the model that it names: {', '.join(wrong[:5])}"
        raise DamagedCheckpointError(reader.folder, what)
    filled = {
        id(meta): nn.Parameter(reader.weight(name).to(dtype), meta.requires_grad) for name, meta in parameters.items()
    }
    # Under every name that a parameter has, so that tied weights stay one.
    state: dict[str, Any] = {name: filled[id(meta)] for name, meta in model.named_parameters(remove_duplicate=False)}
    state |= {name: reader.weight(name).to(buffer.dtype) for name, buffer in buffers.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a model's state, such as the selection bias of a sigmoid router."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
