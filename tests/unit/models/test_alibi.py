"""ALiBi against a direct computation, and in the encoder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_scale.config import MoEConfig, MultimodalConfig, StackConfig
from moe_scale.initialization import Init
from moe_scale.models.alibi import alibi_bias, alibi_slopes
from moe_scale.models.encoder import Encoder
from moe_scale.parallel.groups import ParallelGroups

CONFIG = replace(MultimodalConfig().model.text, d_model=24, num_layers=1, num_heads=3, dropout=0.0)
DENSE = MoEConfig(enabled=False, num_experts=4, top_k=2, intermediate_size=12, activation="relu")


def build(config: StackConfig = CONFIG) -> Encoder:
    return Encoder(config, DENSE, ParallelGroups(), Init(1))


def test_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(16) == pytest.approx([2 ** (-0.5 * n) for n in range(1, 17)])
    assert alibi_slopes(1) == [1 / 256]
    # No power of two: as the paper's code has it.
    assert alibi_slopes(6) == pytest.approx([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])


def test_the_bias_falls_with_the_distance_both_ways() -> None:
    bias_HSS = alibi_bias(5, 2, torch.device("cpu"))
    for head, slope in enumerate([2.0**-4, 2.0**-8]):
        for query in range(5):
            for key in range(5):
                assert bias_HSS[head, query, key] == -slope * abs(query - key)


def test_the_encoder_against_a_direct_computation() -> None:
    """Attention of the one layer, score by score."""
    encoder = build()
    x_BSD = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    valid_BS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    layer = encoder.layers[0]
    attention, given = layer.self_attention, layer.attention_residual.before(x_BSD)
    out_BSD = torch.zeros_like(x_BSD)
    queries = (given @ attention.query.weight.t()).view(2, 5, 3, 8)
    keys, values = ((given @ half.t()).view(2, 5, 3, 8) for half in attention.key_value.weight.chunk(2))
    slopes = [1 / 16, 1 / 256, 1 / 4]
    queries, keys, values = queries.detach(), keys.detach(), values.detach()
    for row in range(2):
        seen = range(5 if row == 0 else 3)
        for place in range(5):
            heads = []
            for head, slope in enumerate(slopes):
                scores = [
                    float(queries[row, place, head] @ keys[row, key, head]) / math.sqrt(8) - slope * abs(place - key)
                    for key in seen
                ]
                weights = torch.tensor(scores).softmax(dim=0)
                heads.append(sum(w * values[row, key, head] for w, key in zip(weights, seen, strict=True)))
            out_BSD[row, place] = torch.cat(heads) @ attention.out.weight.t()
    stream = layer.attention_residual.after(x_BSD, out_BSD)
    expected = encoder.norm(layer.feed_forward(stream, valid_BS, valid_BS.long())[0])
    found = encoder(x_BSD, valid_BS, torch.zeros(2, 5, dtype=torch.int64)).x_BSD
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_goes_on_beyond_any_length_and_ignores_padding() -> None:
    encoder = build()
    x_BSD = torch.randn(1, 700, 24, generator=torch.Generator().manual_seed(0))
    ids_BS = torch.zeros(1, 700, dtype=torch.int64)
    valid_BS = torch.arange(700)[None] < 650
    whole = encoder(x_BSD, valid_BS, ids_BS).x_BSD[:, :650]
    torch.testing.assert_close(whole, encoder(x_BSD[:, :650], valid_BS[:, :650], ids_BS[:, :650]).x_BSD)


def test_it_is_the_same_in_both_directions() -> None:
    """So that what differs by order differs by the distance to a known place alone."""
    encoder = build()
    x_BSD = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(0))
    valid_BS, ids_BS = torch.ones(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.int64)
    turned = encoder(x_BSD.flip(1), valid_BS, ids_BS).x_BSD.flip(1)
    torch.testing.assert_close(turned, encoder(x_BSD, valid_BS, ids_BS).x_BSD)
    first_stays = torch.cat([x_BSD[:, :1], x_BSD[:, 1:].flip(1)], dim=1)
    difference = encoder(first_stays, valid_BS, ids_BS).x_BSD[:, 0] - encoder(x_BSD, valid_BS, ids_BS).x_BSD[:, 0]
    assert difference.abs().max() > 1e-3
