"""The encoder against torch's own, and what recomputation changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_scale.config import ClassifierModelConfig, MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.encoder import Encoder
from moe_scale.parallel.groups import ParallelGroups

# Any settings that have what an encoder reads.
CONFIG = ClassifierModelConfig(
    hidden_size=16, num_layers=2, num_heads=4, dropout=0.0, positions="sinusoidal", norm="layernorm"
)
DENSE = MoEConfig(enabled=False, num_experts=4, top_k=2, intermediate_size=12, activation="relu")


def build(config: ClassifierModelConfig = CONFIG, moe: MoEConfig = DENSE) -> Encoder:
    return Encoder(config, moe, ParallelGroups(), Init(1))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x_BSD = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(2))
    valid_BS = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    return x_BSD, valid_BS, torch.zeros(3, 6, dtype=torch.int64)


def torchs(ours: Encoder, config: ClassifierModelConfig) -> nn.TransformerEncoder:
    """torch's encoder with the same weights; ours has no biases in its maps."""
    pre_norm = config.norm_order == "pre"
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, norm_first=pre_norm, bias=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if pre_norm else None, enable_nested_tensor=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            attention = mine.self_attention
            other.self_attn.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key_value.weight]))
            other.self_attn.out_proj.weight.copy_(attention.out.weight)
            other.linear1.weight.copy_(mine.feed_forward.ffn.gate_up)
            other.linear2.weight.copy_(mine.feed_forward.ffn.down)
    return theirs


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_it_is_torchs_encoder(norm_order: Any) -> None:
    config = replace(CONFIG, norm_order=norm_order)
    ours = build(config)
    theirs = torchs(ours, config)
    x_BSD, valid_BS, ids_BS = inputs()
    from moe_scale.models.encoder import with_positions

    given = with_positions(x_BSD, config, None)[0]
    expected = theirs(given, src_key_padding_mask=~valid_BS)
    found = ours(x_BSD, valid_BS, ids_BS)
    assert found.moe is None
    torch.testing.assert_close(found.x_BSD[valid_BS], expected[valid_BS], rtol=1e-4, atol=1e-5)


def test_recomputation_changes_no_gradient() -> None:
    moe = replace(DENSE, enabled=True, activation="swiglu")
    gradients = []
    for recompute in (False, True):
        encoder = build(replace(CONFIG, activation_checkpointing=recompute), moe)
        encoder(*inputs()).x_BSD.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_statistics_have_a_row_for_each_sparse_layer() -> None:
    stats = build(replace(CONFIG, num_layers=3), replace(DENSE, enabled=True, every=3))(*inputs()).moe
    assert stats is not None
    assert stats.assignments_E.shape == (1, 4)
    assert int(stats.assignments_E.sum()) == 2 * (6 + 4 + 1)
