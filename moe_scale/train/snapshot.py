"""Between a DeepSpeed engine and the pieces of a checkpoint, whatever the ZeRO stage, the backend and the optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_scale.checkpoint.index import BLOCK, MOMENTS, WEIGHT, Index
from moe_scale.checkpoint.reader import Reader, persistent_buffers
from moe_scale.checkpoint.writer import Piece
from moe_scale.errors import ConfigError, Problem
from moe_scale.moe.placement import Placement, placements
from moe_scale.parallel import zero_state
from moe_scale.parallel.zero_state import Held

_MOMENT_KEYS = {
    "exp_avg": ("exp_avg", "state1", "absmax1", "qmap1"),
    "exp_avg_sq": ("exp_avg_sq", "state2", "absmax2", "qmap2"),
}
"""For each moment: torch's name of it, and bitsandbytes' of its values, their scales and the table of codes."""


def take(engine: Any) -> Iterator[Piece]:
    """What this rank writes of weights and moments, as views of the engine's own tensors."""
    places = placements(engine.module)
    for held in zero_state.held_state(engine):
        if held.writer:
            yield from _pieces(engine, held, places[held.name])
    if dist.get_rank() == 0:
        for name, buffer in persistent_buffers(engine.module).items():
            yield Piece(name, tuple(buffer.shape), WEIGHT, 0, buffer.detach().reshape(-1))


def held_bytes(engine: Any) -> int:
    """What this rank writes, about: a weight and two moments of each element in fp32."""
    return sum(12 * held.length for held in zero_state.held_state(engine) if held.writer)


def on_host(piece: Piece) -> Piece:
    """A copy of a piece that training does not change any more."""
    scales = None if piece.scales is None else piece.scales.detach().to("cpu", copy=True)
    return piece._replace(values=piece.values.detach().to("cpu", copy=True), scales=scales)


def numbers(engine: Any, optimizer: str) -> dict[str, Any]:
    """What the optimizer, its schedule and the loss scaler count, and the tables that 8-bit moments are codes of."""
    masters = {id(h.master): h.master for h in zero_state.held_state(engine) if h.master is not None}
    states = [zero_state.optimizer_state(engine, master) for master in masters.values()]
    tables = {
        moment: state[table].tolist()
        for state in states
        for moment, (_, _, _, table) in _MOMENT_KEYS.items()
        if table in state
    }
    return {
        "name": optimizer,
        "steps": int(states[0]["step"]) if states else 0,
        "schedule_steps": int(engine.lr_scheduler.last_epoch),
        "skipped": int(engine.skipped_steps),
        "loss_scaler": zero_state.loss_scaler_state(engine),
        "tables": tables,
    }


def logical_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every logical tensor of a model, with its shape."""
    shapes = {place.tensor: place.shape for place in placements(model).values()}
    return shapes | {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model).items()}


def misfits(engine: Any, index: Index) -> list[Problem]:
    """How a checkpoint's tensors differ from the model's."""
    model = engine.module
    places, mine = placements(model), logical_shapes(model)
    theirs = {name: tensor.shape for name, tensor in index.tensors.items()}
    trained = {places[name].tensor for name, parameter in model.named_parameters() if parameter.requires_grad}
    if lacking := [
        name for name in sorted(trained & theirs.keys()) if not set(MOMENTS) <= index.tensors[name].states.keys()
    ]:
        return [
            Problem(
                "resume",
                f"the checkpoint has no optimizer moments of {lacking[0]}",
                "it holds weights alone: begin another run with them by model.pretrained, where the recipe has it",
            )
        ]
    names = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    return [
        Problem(
            f"resume: {name}",
            f"the checkpoint has {theirs.get(name, 'none')}, the model {mine.get(name, 'none')}",
            "continue with the model that was saved",
        )
        for name in names
    ]


@torch.no_grad()
def put(engine: Any, reader: Reader, *, step: int) -> None:
    """Set weights, moments and counters to those of a checkpoint that fits; all ranks together."""
    failure: ConfigError | None = None
    try:
        _put_values(engine, reader)
    except ConfigError as error:
        failure = error
    failed: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(failed, failure is not None)  # what follows gathers parameters over all ranks
    if any(failed):
        raise failure or ConfigError(Problem("resume", "another rank could not read the checkpoint"))
    said = reader.index.optimizer
    zero_state.refresh_parameters(engine)
    zero_state.set_loss_scaler_state(engine, said["loss_scaler"])
    zero_state.set_step_counts(engine, steps=step, schedule_steps=said["schedule_steps"], skipped=said["skipped"])


def _put_values(engine: Any, reader: Reader) -> None:
    """Fill what this rank holds of weights, moments and buffers."""
    places = placements(engine.module)
    by_master: dict[int, list[Held]] = defaultdict(list)
    for held in zero_state.held_state(engine):
        for at, start, count in _stretches(held, places[held.name]):
            held.values[at : at + count].copy_(reader.read(places[held.name].tensor, WEIGHT, start, count))
        if held.master is not None:
            by_master[id(held.master)].append(held)
    for held_together in by_master.values():
        _put_moments(engine, reader, held_together, places)
    for name, buffer in persistent_buffers(engine.module).items():
        buffer.copy_(reader.weight(name))


def _pieces(engine: Any, held: Held, place: Placement) -> Iterator[Piece]:
    for at, start, count in _stretches(held, place):
        yield Piece(place.tensor, place.shape, WEIGHT, start, held.values[at : at + count])
        if held.master is None:
            continue
        state, first = zero_state.optimizer_state(engine, held.master), held.offset + at
        for moment in MOMENTS:
            values, scales = _moment(state, moment)
            piece = Piece(place.tensor, place.shape, moment, start, values[first : first + count])
            if scales is not None:
                blocks = slice(first // BLOCK, (first + count - 1) // BLOCK + 1)
                piece = piece._replace(scales=scales[blocks], in_block=first % BLOCK)
            yield piece


def _put_moments(engine: Any, reader: Reader, held_together: list[Held], places: dict[str, Placement]) -> None:
    """Fill the moments of one master tensor."""
    master = held_together[0].master
    assert master is not None
    state = zero_state.optimizer_state(engine, master)
    steps = reader.index.optimizer["steps"]
    state["step"] = torch.full_like(state["step"], steps) if isinstance(state["step"], Tensor) else steps
    targets = [
        (held.offset + at, places[held.name].tensor, start, count)
        for held in held_together
        for at, start, count in _stretches(held, places[held.name])
    ]
    for moment in MOMENTS:
        values, scales = _moment(state, moment)
        if scales is None:
            for first, name, start, count in targets:
                values[first : first + count].copy_(reader.read(name, moment, start, count))
        else:
            _put_8bit(reader, moment, targets, values, scales, state[_MOMENT_KEYS[moment][3]])


def _put_8bit(
    reader: Reader, moment: str, targets: list[tuple[int, str, int, int]], codes: Tensor, scales: Tensor, table: Tensor
) -> None:
    """Fill an 8-bit moment: to the bit where it was stored in the same layout, else quantized anew."""
    stored = [reader.codes(name, moment, start, count) for _, name, start, count in targets]
    if all(s is not None and s.in_block == first % BLOCK for s, (first, *_) in zip(stored, targets, strict=True)):
        for s, (first, _, _, count) in zip(stored, targets, strict=True):
            assert s is not None
            codes[first : first + count].copy_(s.codes)
            scales[first // BLOCK : first // BLOCK + len(s.scales)].copy_(s.scales)
        return
    from bitsandbytes.functional import quantize_blockwise

    values = torch.zeros_like(codes, dtype=torch.float32)
    for first, name, start, count in targets:
        values[first : first + count].copy_(reader.read(name, moment, start, count))
    quantized, state = quantize_blockwise(values, code=table, blocksize=BLOCK)
    codes.copy_(quantized)
    scales.copy_(state.absmax)


def _moment(state: dict[str, Any], moment: str) -> tuple[Tensor, Tensor | None]:
    """A moment's flattened values, and their scales where they are 8-bit codes."""
    plain, values, scales, _ = _MOMENT_KEYS[moment]
    return (state[plain] if plain in state else state[values]).view(-1), state.get(scales)


def _stretches(held: Held, place: Placement) -> Iterator[tuple[int, int, int]]:
    """(offset in what is held, first element in the logical tensor, count) of each stretch that is held."""
    for stretch in place.stretches:
        first = max(stretch.in_parameter, held.start)
        last = min(stretch.in_parameter + stretch.length, held.start + held.length)
        if first < last:
            yield first - held.start, stretch.in_tensor + first - stretch.in_parameter, last - first
