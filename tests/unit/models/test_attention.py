"""Attention by hand: masks, the rotary embedding, the gate and the sink share.

Shapes: B batch, S sequence, D model width, H query heads, G key/value heads, A head width.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding, apply_rotary_pos_emb

from moe_scale.config import DecoderConfig
from moe_scale.initialization import Init
from moe_scale.models.attention import Attention, Rope, attention_mask, rope_tables, rotate

CPU = torch.device("cpu")


def make_attention(
    gate: str = "none", *, heads: int = 4, kv_heads: int = 2, width: int = 4, d_model: int = 12
) -> Attention:
    config = DecoderConfig(
        d_model=d_model, num_heads=heads, num_kv_heads=kv_heads, head_dim=width, attention_gate=gate, num_layers=1
    )
    return Attention(config, Init(0) / "attention", depth_scale=1.0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tables(seq_len: int, width: int = 4, start: int = 0) -> Rope:
    return rope_tables(seq_len, width, 10000.0, CPU, start)


# --- masks


def test_mask_by_hand() -> None:
    documents = torch.tensor([[0, 0, 1, 1, -1]])
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],  # padding sees itself, so that its row is not empty
    ]
    mask = attention_mask(documents)
    assert mask.shape == (1, 1, 5, 5)
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == expected


def test_mask_of_each_row_is_its_own() -> None:
    rows = torch.tensor([[0, 0, 0], [0, 1, 1], [-1, -1, -1], [0, 0, -1]])
    together = attention_mask(rows)
    for row in range(len(rows)):
        assert torch.equal(together[row], attention_mask(rows[row : row + 1])[0])


def test_no_mask_is_one_document() -> None:
    layer, x_BSD = make_attention(), randn(2, 7, 12)
    masked, _ = layer(x_BSD, tables(7), attention_mask(torch.zeros(2, 7, dtype=torch.long)))
    torch.testing.assert_close(layer(x_BSD, tables(7))[0], masked)


def test_output_does_not_depend_on_what_the_mask_hides() -> None:
    layer, x_BSD = make_attention(), randn(1, 6, 12)
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    before, _ = layer(x_BSD, tables(6), attention_mask(documents))
    changed_BSD = x_BSD.clone()
    changed_BSD[:, 4:] += 1.0  # the second token of the second document, and the padding
    after, _ = layer(changed_BSD, tables(6), attention_mask(documents))
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


# --- rotary embedding


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> float:
        return float((rotate(q, tables(1, 8, query_at)) * rotate(k, tables(1, 8, key_at))).sum())

    for distance in (0, 1, 17):
        scores = [score(start + distance, start) for start in (0, 1, 5, 300)]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-4)
    assert score(1, 0) != pytest.approx(score(17, 0), abs=1e-2)


def test_position_zero_is_not_turned_and_no_length_changes() -> None:
    x_BHSA = randn(2, 3, 9, 8)
    turned = rotate(x_BHSA, tables(9, 8))
    assert torch.equal(turned[:, :, 0], x_BHSA[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x_BHSA.norm(dim=-1))


def test_tables_continue_from_start() -> None:
    whole, tail = tables(12, 8), tables(5, 8, start=7)
    assert torch.equal(whole.cos[7:], tail.cos)
    assert torch.equal(whole.sin[7:], tail.sin)


@pytest.mark.parametrize(("theta", "width"), [(10000.0, 8), (1e6, 64), (37.0, 2)])
def test_rotation_is_that_of_transformers(theta: float, width: int) -> None:
    config = Qwen3MoeConfig(head_dim=width, rope_parameters={"rope_type": "default", "rope_theta": theta})
    q, k = randn(2, 2, 3, 50, width)
    cos, sin = Qwen3MoeRotaryEmbedding(config)(q, torch.arange(50).unsqueeze(0))
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    rope = rope_tables(50, width, theta, CPU)
    torch.testing.assert_close(rotate(q, rope), expected_q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotate(k, rope), expected_k, rtol=1e-4, atol=1e-5)


def test_bf16_keeps_far_positions_apart() -> None:
    """Angles computed in bf16 would be the same for positions 1000 and 1001."""
    x = randn(1, 1, 1, 8).to(torch.bfloat16)
    near, far = rotate(x, tables(1, 8, 1000)), rotate(x, tables(1, 8, 1001))
    assert near.dtype == torch.bfloat16
    exact = rotate(x.float(), tables(1, 8, 1001))
    torch.testing.assert_close(far.float(), exact, rtol=0.02, atol=0.02)
    assert not torch.allclose(near, far, atol=0.1)


# --- gate


@pytest.mark.parametrize(("gate", "rows"), [("headwise", 4), ("elementwise", 16)])
def test_gate_shape_and_effect(gate: str, rows: int) -> None:
    """A gate closed for some values and half open for the others scales those columns of the output projection."""
    gated, plain = make_attention(gate), make_attention("none")
    assert gated.gate is not None
    assert gated.gate.weight.shape == (rows, 12)
    assert plain.gate is None

    x_BSD = randn(2, 5, 12)
    x_BSD[..., 0] = 1.0
    closed = [1] if gate == "headwise" else [3, 8]
    with torch.no_grad():
        gated.gate.weight.zero_()
        gated.gate.weight[closed, 0] = -200.0
        openness = torch.full((rows,), 0.5)
        openness[closed] = 0.0
        plain.out.weight.mul_(openness.repeat_interleave(16 // rows))
    torch.testing.assert_close(gated(x_BSD, tables(5))[0], plain(x_BSD, tables(5))[0])


def test_gate_reads_the_layer_input() -> None:
    """Y * sigmoid(X W), with X the input of the layer: recomputed here from the layer without a gate."""
    gated, plain = make_attention("headwise"), make_attention("none")
    x_BSD = randn(2, 5, 12)
    with torch.no_grad():
        plain.out.weight.zero_()
    expected = torch.zeros(2, 5, 12)
    for head in range(4):
        columns = slice(4 * head, 4 * head + 4)
        with torch.no_grad():
            plain.out.weight.zero_()[:, columns] = gated.out.weight[:, columns]
        expected += torch.sigmoid(x_BSD @ gated.gate.weight[head]).unsqueeze(-1) * plain(x_BSD, tables(5))[0]
    torch.testing.assert_close(gated(x_BSD, tables(5))[0], expected)


# --- sink share


@pytest.fixture
def same_direction() -> tuple[Attention, Tensor]:
    """One head of width 2 whose queries and keys are all (sqrt 2, 0) before the rotation, and an input of 3 tokens.

    Positions turn them by one radian each, so the score of a query i and a key j is 2 cos(i - j) / sqrt(2).
    """
    layer = make_attention(heads=1, kv_heads=1, width=2, d_model=2)
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.qkv.weight[[0, 2], 0] = 1000.0  # far above the norm's epsilon
    return layer, torch.tensor([[[1.0, 0.3], [1.0, -2.0], [1.0, 0.7]]])


def exp_score(distance: int) -> float:
    return math.exp(math.sqrt(2) * math.cos(distance))


def test_sink_share_by_hand(same_direction: tuple[Attention, Tensor]) -> None:
    layer, x_BSD = same_direction
    _, share = layer(x_BSD, tables(3, 2), want_sink=True)
    of_second = exp_score(1) / (exp_score(1) + exp_score(0))
    of_third = exp_score(2) / (exp_score(2) + exp_score(1) + exp_score(0))
    # The first query can look at nothing else, so it says nothing.
    assert float(share) == pytest.approx((of_second + of_third) / 2, abs=1e-5)


@pytest.mark.parametrize("documents", [[0, 0, 1], [0, 1, 1]])
def test_sink_share_with_documents(same_direction: tuple[Attention, Tensor], documents: list[int]) -> None:
    """Each document has a first token of its own; in both of these one query has a choice."""
    layer, x_BSD = same_direction
    _, share = layer(x_BSD, tables(3, 2), attention_mask(torch.tensor([documents])), want_sink=True)
    assert float(share) == pytest.approx(exp_score(1) / (exp_score(1) + exp_score(0)), abs=1e-5)


def test_sink_share_where_no_query_has_a_choice(same_direction: tuple[Attention, Tensor]) -> None:
    layer, x_BSD = same_direction
    _, share = layer(x_BSD, tables(3, 2), attention_mask(torch.tensor([[0, 1, 2]])), want_sink=True)
    assert float(share) == 0


def test_sink_share_averages_heads_and_rows() -> None:
    layer, x_BSD = make_attention(), randn(3, 6, 12)
    with_sink, share = layer(x_BSD, tables(6), want_sink=True)
    without, nothing = layer(x_BSD, tables(6))
    assert nothing is None
    assert torch.equal(with_sink, without)
    assert not share.requires_grad
    of_rows = [float(layer(x_BSD[row : row + 1], tables(6), want_sink=True)[1]) for row in range(3)]
    assert float(share) == pytest.approx(sum(of_rows) / 3, abs=1e-6)
    assert 0 < float(share) < 1
