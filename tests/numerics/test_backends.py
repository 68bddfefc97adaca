"""The three backends of one layer, on one rank: what a seed gives is the same whoever computes it.

Without a capacity all three agree entirely. Under a capacity (AutoEP has none) the same choices are dropped, and
``deepspeed.moe`` departs from this project's layer in one way, stated by a test here with the dense einsum MoE told to
do as DeepSpeed does: for K > 1 a token's weights are rescaled over the choices that are kept. This project's layer
leaves them as they are, so that a dropped choice passes by the residual with its weight.

Shapes: B batch, S sequence, T = B*S tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.backends import build_moe
from moe_scale.moe.backends.deepspeed import DeepSpeedMoE
from moe_scale.moe.backends.support import unsupported
from moe_scale.moe.layer import MoELayer, MoEStats, rows_per_expert
from moe_scale.parallel.groups import ParallelGroups
from tests.oracle import OracleResult, dense_moe

D_MODEL = 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CONFIG = MoEConfig(num_experts=6, top_k=2, intermediate_size=8, min_capacity=1)
CAPACITY = dataclasses.replace(CONFIG, dispatch="capacity", capacity_factor=0.6, eval_capacity_factor=0.9)
SEEDS = (0, 1, 2)

Gradients = dict[str, Tensor]


def build(backend: str, config: MoEConfig, seed: int) -> nn.Module:
    return build_moe(dataclasses.replace(config, backend=backend), D_MODEL, ParallelGroups(), Init(seed))


def make_input(seed: int) -> Tensor:
    return torch.randn(2, 24, D_MODEL, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def weight_gradients(layer: nn.Module) -> Gradients:
    """Gradients of the layer's weights in the layout of this project's layer, whoever owns them."""
    if isinstance(layer, DeepSpeedMoE):
        experts = layer.layer.experts.deepspeed_experts
        return {
            "router": layer.layer.gate.wg.weight.grad,
            "gate_up": torch.stack([expert.gate_up.grad for expert in experts]),
            "down": torch.stack([expert.down.grad for expert in experts]),
        }
    block = layer if isinstance(layer, MoELayer) else layer.block
    return {
        "router": block.router.weight.grad, "gate_up": block.experts.gate_up.grad, "down": block.experts.down.grad,
    }  # fmt: skip


def run(layer: nn.Module, x_BSD: Tensor) -> tuple[Tensor, MoEStats, Gradients]:
    """Output, statistics and the gradients of a random projection of the output plus both losses."""
    x_BSD.grad = None
    y_BSD, stats = layer(x_BSD)
    project(y_BSD, stats.aux_loss, stats.z_loss).backward()
    return y_BSD.detach(), stats, {"x": x_BSD.grad, **weight_gradients(layer)}


def project(y_BSD: Tensor, aux_loss: Tensor, z_loss: Tensor) -> Tensor:
    direction = torch.randn(y_BSD.shape, generator=torch.Generator().manual_seed(7))
    return (y_BSD * direction).sum() + aux_loss + z_loss


def assert_same_stats(ours: MoEStats, theirs: MoEStats) -> None:
    for name, a, b in zip(MoEStats._fields, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    assert ours.dropped == theirs.dropped
    assert torch.equal(ours.assignments_E, theirs.assignments_E)


def assert_same_gradients(ours: Gradients, theirs: Gradients) -> None:
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def as_deepspeed(layer: MoELayer, x_BSD: Tensor) -> tuple[OracleResult, Gradients]:
    """The dense einsum MoE with this layer's weights, doing what ``deepspeed.moe`` does under a capacity."""
    config, x_TD = layer.config, x_BSD.detach().flatten(0, 1).requires_grad_()
    wanted = {
        "x": x_TD, "router": layer.router.weight, "gate_up": layer.experts.gate_up, "down": layer.experts.down,
    }  # fmt: skip
    result = dense_moe(
        *wanted.values(), top_k=config.top_k, renormalize=config.renormalize, drop_policy=config.drop_policy,
        rows_per_expert=rows_per_expert(config, x_TD.shape[0], training=layer.training), as_deepspeed=True,
    )  # fmt: skip
    total = project(result.output_TD.view_as(x_BSD), result.aux_loss, result.z_loss)
    found = dict(zip(wanted, torch.autograd.grad(total, list(wanted.values())), strict=True))
    return result, found | {"x": found["x"].view_as(x_BSD)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
def test_dropless_backends_agree(backend: str, top_k: int, seed: int) -> None:
    config = dataclasses.replace(CONFIG, top_k=top_k)
    x_BSD = make_input(seed)
    y_ours, stats_ours, gradients_ours = run(build("custom", config, seed), x_BSD)
    y_theirs, stats_theirs, gradients_theirs = run(build(backend, config, seed), x_BSD)
    torch.testing.assert_close(y_ours, y_theirs, **CLOSE)
    assert_same_stats(stats_ours, stats_theirs)
    assert_same_gradients(gradients_ours, gradients_theirs)
    assert stats_theirs.dropped == 0


def test_autoep_without_renormalization_agrees() -> None:
    config = dataclasses.replace(CONFIG, top_k=3, renormalize=False)
    x_BSD = make_input(0)
    y_ours, _, gradients_ours = run(build("custom", config, 0), x_BSD)
    y_theirs, _, gradients_theirs = run(build("autoep", config, 0), x_BSD)
    torch.testing.assert_close(y_ours, y_theirs, **CLOSE)
    assert_same_gradients(gradients_ours, gradients_theirs)


@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
def test_padding_counts_in_no_loss(backend: str) -> None:
    """These backends route padding like other tokens, so of the outputs only those of real tokens are promised."""
    x_BSD = make_input(3)
    valid_BS = torch.arange(24).expand(2, 24) < torch.tensor([[24], [15]])
    y_ours, stats_ours = build("custom", CONFIG, 0)(x_BSD, valid_BS)
    y_theirs, stats_theirs = build(backend, CONFIG, 0)(x_BSD, valid_BS)
    torch.testing.assert_close(y_ours[valid_BS], y_theirs[valid_BS], **CLOSE)
    assert_same_stats(stats_ours, stats_theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("top_k", "policy"), [(1, "position"), (2, "position"), (3, "probability")])
def test_same_number_is_dropped(top_k: int, policy: str, seed: int, training: bool) -> None:
    """How many pairs an expert cannot take depends on how many it is given, not on who is dropped."""
    config = dataclasses.replace(CAPACITY, top_k=top_k, drop_policy=policy)
    x_BSD = make_input(seed)
    stats = []
    for backend in ("custom", "deepspeed"):
        layer = build(backend, config, seed).train(training)
        stats.append(layer(x_BSD)[1])
    assert_same_stats(*stats)
    assert stats[0].dropped > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("top_k", "policy"), [(2, "position"), (3, "probability")])
def test_capacity_is_the_layer_with_weights_rescaled_over_kept_choices(
    top_k: int, policy: str, seed: int, training: bool
) -> None:
    config = dataclasses.replace(CAPACITY, top_k=top_k, drop_policy=policy)
    x_BSD = make_input(seed)
    y_BSD, stats, gradients = run(build("deepspeed", config, seed).train(training), x_BSD)
    expected, expected_gradients = as_deepspeed(build("custom", config, seed).train(training), x_BSD)
    torch.testing.assert_close(y_BSD, expected.output_TD.view_as(y_BSD), **CLOSE)
    assert stats.dropped == expected.dropped > 0
    assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("seed", SEEDS)
def test_top_2_capacity_agrees_for_tokens_that_lost_nothing(seed: int) -> None:
    """By position, both keep the same choices; tokens that lost both get 0, those that lost one differ by a factor."""
    config = dataclasses.replace(CAPACITY, top_k=2)
    x_BSD = make_input(seed)
    layer = build("custom", config, seed)
    y_ours, y_theirs = layer(x_BSD)[0].flatten(0, 1), build("deepspeed", config, seed)(x_BSD)[0].flatten(0, 1)
    kept_TK = as_deepspeed(layer, x_BSD)[0].kept_TK
    num_kept_T = kept_TK.sum(dim=1)
    assert set(num_kept_T.tolist()) == {0, 1, 2}
    torch.testing.assert_close(y_ours[num_kept_T == 2], y_theirs[num_kept_T == 2], **CLOSE)
    assert not y_ours[num_kept_T == 0].any()
    assert not y_theirs[num_kept_T == 0].any()
    one_T = num_kept_T == 1
    weights_TK = layer.router(x_BSD).flatten(0, 1).softmax(dim=-1).topk(2, dim=-1).values
    kept_share_T = (weights_TK * kept_TK).sum(dim=1) / weights_TK.sum(dim=1)
    torch.testing.assert_close(y_ours[one_T], y_theirs[one_T] * kept_share_T[one_T].unsqueeze(1), **CLOSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_top_1_capacity_keeps_or_drops_whole_tokens(seed: int) -> None:
    """A token gets what it gets without a capacity, or 0; an expert is full before it drops anyone."""
    config = dataclasses.replace(CAPACITY, top_k=1)
    x_BSD = make_input(seed)
    dropless = build("custom", dataclasses.replace(config, dispatch="dropless"), seed)
    places = rows_per_expert(config, 48, training=True)
    ids_T = dropless.router(x_BSD).flatten(0, 1).argmax(dim=-1)
    y_dropless = dropless(x_BSD)[0].flatten(0, 1)
    for backend in ("custom", "deepspeed"):
        y_TD, stats = build(backend, config, seed)(x_BSD)
        y_TD = y_TD.flatten(0, 1)
        kept_T = y_TD.any(dim=-1)
        torch.testing.assert_close(y_TD[kept_T], y_dropless[kept_T], **CLOSE)
        kept_per_expert = torch.bincount(ids_T[kept_T], minlength=config.num_experts)
        assert torch.equal(kept_per_expert, stats.assignments_E.long().clamp(max=places))
        assert stats.dropped == (~kept_T).sum() > 0


@pytest.mark.parametrize(("top_k", "policy"), [(1, "position"), (2, "position"), (3, "probability")])
def test_capacity_leaves_nothing_to_chance(top_k: int, policy: str) -> None:
    """DeepSpeed selects tokens and second experts at random unless it is told not to."""
    layer = build("deepspeed", dataclasses.replace(CAPACITY, top_k=top_k, drop_policy=policy), 0)
    x_BSD = make_input(0)
    assert torch.equal(layer(x_BSD)[0], layer(x_BSD)[0])


def test_top_1_capacity_drops_by_position() -> None:
    config = dataclasses.replace(CAPACITY, top_k=1)
    x_BSD = make_input(0)
    torch.testing.assert_close(build("custom", config, 0)(x_BSD)[0], build("deepspeed", config, 0)(x_BSD)[0], **CLOSE)


def test_top_1_takes_a_single_token() -> None:
    """As generation from a prompt of one token does."""
    config = dataclasses.replace(CONFIG, top_k=1, min_capacity=4)
    x_BSD = make_input(0)[:1, :1]
    torch.testing.assert_close(build("custom", config, 0)(x_BSD)[0], build("deepspeed", config, 0)(x_BSD)[0], **CLOSE)


def test_no_graph_is_left_on_the_module() -> None:
    """DeepSpeed keeps its loss on the layer, which would hold a step's activations until the next one."""
    layer = build("deepspeed", CONFIG, 0)
    layer(make_input(0))
    left = [
        f"{name}.{key}"
        for name, module in layer.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    assert not left


class StandInTutel:
    """What ``deepspeed.moe`` calls of Tutel, written with torch."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def fast_cumsum_sub_one(self, mask_TE: Tensor) -> Tensor:
        self.calls.append("cumsum")
        return mask_TE.cumsum(dim=0) - 1

    def fast_dispatcher(self, num_experts: int, capacity: int, d_model: int, dispatch_dtype: torch.dtype) -> Any:
        self.calls.append("dispatcher")
        return StandInDispatcher(self, num_experts)


class StandInDispatcher:
    def __init__(self, tutel: StandInTutel, num_experts: int):
        self.tutel, self.num_experts = tutel, num_experts

    def update(self, ids: list[Tensor], places: list[Tensor], gates: list[Tensor], capacity: int) -> None:
        self.rows = self.num_experts * capacity
        # A choice that goes nowhere has a negative expert; its row is one beyond the last.
        self.slots = [torch.where(i < 0, self.rows, i.long() * capacity + p) for i, p in zip(ids, places, strict=True)]
        self.gates = gates

    def encode(self, x_TD: Tensor) -> Tensor:
        self.tutel.calls.append("encode")
        rows = x_TD.new_zeros(self.rows + 1, x_TD.shape[1])
        for slots in self.slots:
            rows = rows.index_add(0, slots, x_TD)
        return rows[:-1]

    def decode(self, rows: Tensor) -> Tensor:
        self.tutel.calls.append("decode")
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return sum(rows[slots] * gates.unsqueeze(1) for slots, gates in zip(self.slots, self.gates, strict=True))


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize(("top_k", "policy"), [(1, "position"), (2, "position"), (3, "probability")])
def test_tutel_is_used_where_it_is_importable(
    top_k: int, policy: str, dispatch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.moe import sharded_moe

    config = dataclasses.replace(CAPACITY, top_k=top_k, drop_policy=policy, dispatch=dispatch)
    x_BSD, plain = make_input(0), build("deepspeed", config, 0)
    assert plain.layer.use_tutel == sharded_moe.TUTEL_INSTALLED
    y_plain, stats_plain, gradients_plain = run(plain, x_BSD)
    tutel = StandInTutel()
    monkeypatch.setattr(sharded_moe, "TUTEL_INSTALLED", True)
    monkeypatch.setattr(sharded_moe, "tutel_moe", tutel, raising=False)
    y_BSD, stats, gradients = run(build("deepspeed", config, 0), x_BSD)
    assert tutel.calls == [*(["cumsum"] if top_k == 1 else []), "dispatcher", "encode", "decode"]
    torch.testing.assert_close(y_BSD, y_plain, **CLOSE)
    assert_same_stats(stats, stats_plain)
    assert_same_gradients(gradients, gradients_plain)


@pytest.mark.parametrize(
    ("change", "stage", "where"),
    [
        ({"backend": "autoep", "dispatch": "capacity"}, 3, "moe.dispatch"),
        ({"backend": "autoep", "ep_size": 2}, 0, "moe.ep_size"),
        ({"backend": "custom", "ep_size": 2}, 2, "moe.ep_size"),
        ({"backend": "deepspeed", "ep_size": 2}, 1, "moe.ep_size"),
        ({"backend": "deepspeed", "renormalize": False}, 0, "moe.renormalize"),
        ({"backend": "deepspeed", "dispatch": "capacity", "drop_policy": "probability"}, 0, "moe.drop_policy"),
        ({"backend": "deepspeed", "dispatch": "capacity", "top_k": 3}, 0, "moe.drop_policy"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(change: dict[str, object], stage: int, where: str) -> None:
    found = unsupported(dataclasses.replace(CONFIG, **change), zero_stage=stage)
    assert [problem.where for problem in found] == [where]
    assert unsupported(dataclasses.replace(CONFIG, **change, enabled=False), zero_stage=stage) == []
