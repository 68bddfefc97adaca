"""The decoder as a whole: initial weights, what the loss is made of, causality and recomputation.

Shapes: B batch, S sequence, D model width, V vocabulary, E experts, M sparse layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.decoder import DecoderLM, LMOutput
from moe_scale.models.layers import dense_hidden, is_sparse
from moe_scale.moe.backends import build_moe
from moe_scale.moe.experts import Experts
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.zero import is_expert_parallel

CONFIG = DecoderConfig(
    vocab_size=97, num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, attention_gate="headwise", loss_chunk_tokens=5
)
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)
CUT_STD = 0.98658  # standard deviation of a unit normal that is cut at three


def make_ids(batch: int = 2, seq_len: int = 11, vocab: int = 97, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def run(model: DecoderLM, *args: Any, **kwargs: Any) -> LMOutput:
    output = model(*args, **kwargs)
    assert isinstance(output, LMOutput)
    return output


# --- initial weights


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_initial_standard_deviations(gate: str) -> None:
    config = DecoderConfig(
        vocab_size=300, num_layers=8, d_model=48, num_heads=4, num_kv_heads=2, head_dim=16, attention_gate=gate
    )
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=20, every=2)
    fan_in, depth = 48**-0.5, 16**-0.5  # each of the eight layers adds to the residual stream twice
    expected = {
        "embedding.weight": fan_in,
        "attention.qkv.weight": fan_in,
        "attention.gate.weight": fan_in,
        "attention.out.weight": depth * 64**-0.5,
        "moe.router.weight": fan_in,
        "moe.experts.gate_up": fan_in,
        "moe.experts.down": depth * 20**-0.5,
        "ffn.gate_up.weight": fan_in,
        "ffn.down.weight": depth * 40**-0.5,  # a dense layer is as wide as the K experts that it stands for
    }
    seen = set()
    for name, weight in DecoderLM(config, moe).named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        place = name.split(".", 2)[2] if name.startswith("layers.") else name
        seen.add(place)
        std, values = expected[place], weight.detach()
        # Five standard errors of a mean and of a standard deviation.
        assert abs(values.mean()) <= 5 * std / math.sqrt(values.numel()), name
        error = 5 / math.sqrt(2 * values.numel())
        assert values.square().mean().sqrt().item() == pytest.approx(CUT_STD * std, rel=error), name
        assert values.abs().max() <= 3 * std * (1 + 1e-6), name
    assert seen == expected.keys()


def test_seed_and_path_decide_the_weights() -> None:
    weights = dict(DecoderLM(CONFIG, MOE, seed=5).named_parameters())
    again = dict(DecoderLM(CONFIG, MOE, seed=5).named_parameters())
    other = dict(DecoderLM(CONFIG, MOE, seed=6).named_parameters())
    for name, weight in weights.items():
        assert torch.equal(weight, again[name]), name
        assert name.endswith("norm.weight") or not torch.equal(weight, other[name]), name
    drawn = [w.flatten()[:8] for name, w in weights.items() if not name.endswith("norm.weight")]
    unit = [tuple((w / w.norm()).tolist()) for w in drawn]
    assert len(set(unit)) == len(unit), "two weights were drawn from one seed"
    experts = weights["layers.0.moe.experts.gate_up"]
    assert not torch.equal(experts[0], experts[1])


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = DecoderLM(CONFIG, MOE)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(model.embedding.weight, DecoderLM(CONFIG, MOE).embedding.weight)


def test_bf16_weights_are_the_rounded_fp32_weights() -> None:
    wide, narrow = torch.empty(50), torch.empty(50, dtype=torch.bfloat16)
    (Init(3) / "a").normal_(wide, 0.5)
    (Init(3) / "a").normal_(narrow, 0.5)
    assert torch.equal(narrow, wide.to(torch.bfloat16))


def expert_weights(layer: torch.nn.Module, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "deepspeed":
        experts = layer.layer.experts.deepspeed_experts
        stacked = torch.stack([e.gate_up for e in experts]), torch.stack([e.down for e in experts])
        return layer.layer.gate.wg.weight, *stacked
    block = layer.block if backend == "autoep" else layer
    return block.router.weight, block.experts.gate_up, block.experts.down


@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
def test_backends_start_from_the_same_weights(backend: str) -> None:
    def build(name: str) -> tuple[Tensor, Tensor, Tensor]:
        moe = dataclasses.replace(MOE, backend=name)
        return expert_weights(build_moe(moe, 24, ParallelGroups(), Init(4) / "moe", depth_scale=0.3), name)

    for ours, theirs in zip(build("custom"), build(backend), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["custom", "deepspeed"])
def test_ranks_start_from_slices_of_the_same_weights(backend: str) -> None:
    """With the experts split over two ranks, each holds exactly its half; the router is whole on both."""
    moe, init = dataclasses.replace(MOE, backend=backend), Init(4) / "moe"
    router, gate_up, down = expert_weights(build_moe(moe, 24, ParallelGroups(), init), backend)
    for rank in range(2):
        groups = ParallelGroups(world_size=2, rank=rank, ep_size=2, ep_rank=rank)
        mine = expert_weights(build_moe(moe, 24, groups, init), backend)
        experts = slice(2 * rank, 2 * rank + 2)
        for ours, theirs in zip(mine, (router, gate_up[experts], down[experts]), strict=True):
            assert torch.equal(ours, theirs)


def test_expert_parallel_weights_are_marked() -> None:
    """ZeRO-3 reads these marks when it shards; an unmarked expert would silently become a copy of rank 0's."""
    groups = ParallelGroups(world_size=4, rank=3, ep_size=2, ep_rank=1, expert_data="a group")
    for parameter in Experts(MoEConfig(num_experts=8, intermediate_size=5), 6, groups, Init(0)).parameters():
        assert is_expert_parallel(parameter)
        assert parameter.group_name == parameter.ds_zero_partition_group_name == "ep_size_2"
        assert parameter.ds_zero_partition_process_group == "a group"
    assert not any(
        map(
            is_expert_parallel,
            Experts(MoEConfig(num_experts=8, intermediate_size=5), 6, ParallelGroups(), Init(0)).parameters(),
        )
    )


def test_loss_at_initialization() -> None:
    """Targets at random, against logits of unit variance: ln V, plus half their variance for the normalizer."""
    config = dataclasses.replace(CONFIG, vocab_size=2000, d_model=64, num_layers=4, loss_chunk_tokens=512)
    with torch.no_grad():
        output = run(DecoderLM(config, MOE), make_ids(8, 64, 2000), make_ids(8, 64, 2000, seed=1))
    assert float(output.lm_loss) == pytest.approx(math.log(2000) + 0.5, abs=0.1)
    assert output.moe.aux_loss.tolist() == pytest.approx([1.0] * 4, abs=0.2), "routing starts about even"


# --- the loss and what comes with it


def test_loss_is_made_of_its_parts() -> None:
    moe = dataclasses.replace(MOE, aux_loss_weight=0.02, z_loss_weight=0.003)
    model, ids_BS, targets_BS = DecoderLM(CONFIG, moe), make_ids(), make_ids(seed=1)
    targets_BS[0, :4] = -100
    output = run(model, ids_BS, targets_BS)
    expected = torch.nn.functional.cross_entropy(model(ids_BS).flatten(0, 1), targets_BS.flatten())
    torch.testing.assert_close(output.lm_loss, expected)
    assert output.num_targets == 18
    router_losses = 0.02 * output.moe.aux_loss.sum() + 0.003 * output.moe.z_loss.sum()
    torch.testing.assert_close(output.loss, expected + router_losses)
    assert output.sink_share is None


def test_statistics_of_sparse_layers() -> None:
    config, moe = dataclasses.replace(CONFIG, num_layers=5), dataclasses.replace(MOE, every=2)
    model = DecoderLM(config, moe)
    assert [is_sparse(moe, layer) for layer in range(5)] == [False, True, False, True, False]
    assert [hasattr(layer, "moe") for layer in model.layers] == [False, True, False, True, False]
    output = run(model, make_ids(), make_ids(seed=1), want_sink=True)
    assert output.moe.aux_loss.shape == output.moe.dropped.shape == (2,)
    assert output.moe.assignments_E.shape == (2, 4)
    assert output.moe.assignments_E.sum(dim=1).tolist() == [44, 44]
    assert output.sink_share.shape == (5,)
    assert not output.sink_share.requires_grad


def test_padding_counts_in_no_sink_share() -> None:
    model, ids_BS = DecoderLM(CONFIG, MOE), make_ids(1, 8)
    documents = torch.tensor([[0, 0, 0, -1, -1, -1, -1, -1]])
    padded = run(model, ids_BS, ids_BS, documents, want_sink=True)
    alone = run(model, ids_BS[:, :3], ids_BS[:, :3], want_sink=True)
    torch.testing.assert_close(padded.sink_share, alone.sink_share)


def test_dense_model() -> None:
    moe = dataclasses.replace(MOE, enabled=False)
    model = DecoderLM(CONFIG, moe)
    output = run(model, make_ids(), make_ids(seed=1))
    assert output.moe is None
    assert torch.equal(output.loss, output.lm_loss)
    assert {layer.ffn.down.weight.shape for layer in model.layers} == {(24, dense_hidden(moe))}


def test_no_target_at_all_gives_a_loss_of_zero() -> None:
    model = DecoderLM(CONFIG, MOE)
    documents = torch.full((2, 11), -1)
    output = run(model, make_ids(), torch.full((2, 11), -100), documents)
    assert output.loss == output.lm_loss == output.num_targets == 0
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} would be missing from a reduction over ranks"
        assert not parameter.grad.any(), name


def test_last_only() -> None:
    model, ids_BS = DecoderLM(CONFIG, MOE), make_ids()
    last, whole = model(ids_BS, last_only=True), model(ids_BS)
    assert last.shape == (2, 1, 97)
    torch.testing.assert_close(last[:, 0], whole[:, -1])


@pytest.mark.parametrize("position", [0, 4, 10])
def test_a_token_changes_nothing_before_it(position: int) -> None:
    model, ids_BS = DecoderLM(CONFIG, MOE), make_ids()
    changed_BS = ids_BS.clone()
    changed_BS[:, position] = (changed_BS[:, position] + 1) % 97
    before, after = model(ids_BS), model(changed_BS)
    torch.testing.assert_close(before[:, :position], after[:, :position])
    assert not torch.allclose(before[:, position], after[:, position])


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_activation_checkpointing_gives_the_same_gradients(dispatch: str) -> None:
    moe = dataclasses.replace(MOE, dispatch=dispatch, capacity_factor=0.5, every=2)
    documents = torch.tensor([[0] * 6 + [1] * 5, [0] * 8 + [-1] * 3])
    results = []
    for recompute in (False, True):
        model = DecoderLM(dataclasses.replace(CONFIG, activation_checkpointing=recompute), moe)
        output = run(model, make_ids(), make_ids(seed=1), documents, want_sink=True)
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters()}))
    (stored, stored_gradients), (recomputed, recomputed_gradients) = results
    assert torch.equal(stored.loss, recomputed.loss)
    assert torch.equal(stored.sink_share, recomputed.sink_share)
    assert torch.equal(stored.moe.dropped, recomputed.moe.dropped)
    for name, gradient in stored_gradients.items():
        assert torch.equal(gradient, recomputed_gradients[name]), name
