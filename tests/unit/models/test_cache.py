"""Sequences continued from what is kept of them give the logits of a forward pass over each of them alone.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models.cache import Past, positions_of
from moe_scale.models.decoder import DecoderLM

VOCAB = 97
CONFIG = DecoderConfig(
    vocab_size=VOCAB, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, attention_gate="headwise"
)
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)
LENGTHS = (7, 1, 4)

VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"attention_gate": "none", "num_kv_heads": 4}, {"every": 2}),
    ({"attention_gate": "elementwise", "num_kv_heads": 1, "head_dim": 10}, {"router": "sigmoid"}),
    ({}, {"enabled": False}),
    ({}, {"router": "hash", "shared_intermediate_size": 6}),
    ({}, {"router": "noisy", "residual": True, "router_jitter": 0.1}),
    ({"rope_theta": 50.0}, {"top_k": 1, "expert_dropout": 0.5}),
]


def build(model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None) -> DecoderLM:
    """A model in evaluation mode whose norms are not all ones."""
    built = DecoderLM(replace(CONFIG, **(model or {})), replace(MOE, **(moe or {})), seed=3).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return built


def sequences(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
    """The rows in one batch, padded on the left, and where they are real."""
    ids_BS = torch.full((len(rows), max(map(len, rows))), fill)
    valid_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids_BS[number, -len(row) :], valid_BS[number, -len(row) :] = row, True
    return ids_BS, valid_BS


def whole(model: DecoderLM, rows: list[Tensor]) -> Tensor:
    """Logits [B, V] after each row, of a forward pass over it alone."""
    with torch.no_grad():
        return torch.stack([model(row.unsqueeze(0), last_only=True)[0, -1] for row in rows])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "moe"), VARIANTS, ids=str)
def test_continued_rows_of_unequal_length_are_whole_ones(config: dict[str, Any], moe: dict[str, Any]) -> None:
    model, rows = build(config, moe), sequences(*LENGTHS)
    logits_BV, state = model.start(*padded(rows))
    close(logits_BV, whole(model, rows))
    for seed in range(3):
        next_B = torch.cat(sequences(1, 1, 1, seed=seed))
        rows = [torch.cat([row, token.view(1)]) for row, token in zip(rows, next_B, strict=True)]
        logits_BV, state = model.step(next_B, state)
        close(logits_BV, whole(model, rows))
    assert state.lengths().tolist() == [length + 3 for length in LENGTHS]


def test_rows_without_padding_need_no_mask() -> None:
    model, rows = build(), sequences(5, 5)
    logits_BV, state = model.start(torch.stack(rows))
    close(logits_BV, whole(model, rows))
    assert state.lengths().tolist() == [5, 5]


def test_what_pads_changes_nothing() -> None:
    model, rows = build(moe={"router": "hash"}), sequences(*LENGTHS)
    one, state = model.start(*padded(rows, fill=0))
    other, _ = model.start(*padded(rows, fill=96))
    assert torch.equal(one, other)
    state.layers[0].keys[1, :, 0] = 1e3  # a key of padding
    state.layers[1].values[1, :, 0] = 1e3
    close(model.step(torch.tensor([1, 2, 3]), state)[0][1], whole(model, [torch.cat([rows[1], torch.tensor([2])])])[0])


def test_rows_leave_and_join_between_steps() -> None:
    model, rows = build(), sequences(9, 2, 4)
    _, state = model.start(*padded(rows))
    state = state.select(torch.tensor([2, 1, 2]))
    rows = [rows[2], rows[1], rows[2]]
    assert state.valid_BS.shape == (3, 4), "columns that only the longest row needed are gone with it"
    new = sequences(6, 1, seed=8)
    _, joining = model.start(*padded(new))
    for state, rows in ((state.join(joining), rows + new), (joining.join(state), new + rows)):  # noqa: B020
        next_B = torch.arange(len(rows))
        longer = [torch.cat([row, token.view(1)]) for row, token in zip(rows, next_B, strict=True)]
        logits_BV, after = model.step(next_B, state)
        close(logits_BV, whole(model, longer))
        close(model.step(next_B, after)[0], whole(model, [torch.cat([*pair]) for pair in zip(
            longer, next_B.split(1), strict=True)]))  # fmt: skip


def test_a_state_is_left_as_it_is() -> None:
    model = build()
    _, state = model.start(*padded(sequences(*LENGTHS)))
    kept = Past(tuple(type(layer)(*(part.clone() for part in layer)) for layer in state.layers), state.valid_BS.clone())
    first, _ = model.step(torch.tensor([1, 2, 3]), state)
    state.select(torch.tensor([0])).join(state)
    model.step(torch.tensor([4, 5, 6]), state)
    again, _ = model.step(torch.tensor([1, 2, 3]), state)
    assert torch.equal(first, again)
    assert all(torch.equal(now, before) for now, before in zip(state.layers[1], kept.layers[1], strict=True))


def test_positions_count_real_tokens() -> None:
    valid_BS = torch.tensor([[False, False, True, True], [True] * 4])
    assert positions_of(valid_BS).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
