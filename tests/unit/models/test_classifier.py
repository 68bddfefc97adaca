"""The classifier: padding, order, pooling, what it begins with, and its counts against the module."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_scale.config import ClassifierConfig, ClassifierModelConfig, ClassifierMoEConfig, MoEConfig
from moe_scale.models.build import build_model
from moe_scale.models.classifier import Classifier, Pooling
from moe_scale.models.classifier_counts import num_active_params, num_params, training_flops
from moe_scale.settings import to_dict

MODEL = ClassifierModelConfig(
    input_size=12, hidden_size=16, output_size=3, num_experts=4, k=2, num_layers=2, dropout=0.0, num_heads=4,
    vocab_size=300,
)  # fmt: skip
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=16)
NONE = -100


def build(model: ClassifierModelConfig = MODEL, moe: MoEConfig = MOE, **how: Any) -> Classifier:
    return Classifier(model, moe, seed=3, **how).eval()


def tokens(lengths: list[int], width: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Padded ids, and where they are no padding."""
    width = width or max(lengths)
    ids_BS = torch.randint(1, 300, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    valid_BS = torch.arange(width) < torch.tensor(lengths)[:, None]
    return ids_BS * valid_BS, valid_BS


def labels(*given: int) -> Tensor:
    return torch.tensor(given)


POSITIONS = ["rotary", "sinusoidal", "learned"]


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing(positions: Any, pooling: Any) -> None:
    model = build(replace(MODEL, positions=positions, pooling=pooling))
    ids_BS, valid_BS = tokens([5, 2, 4])
    wide_ids, wide_valid = torch.nn.functional.pad(ids_BS, (0, 6)), torch.nn.functional.pad(valid_BS, (0, 6))
    wide_ids[0, 9] = 77  # what is in the padding does not matter
    narrow, wide = model(ids_BS, valid_BS, labels(0, 1, 2)), model(wide_ids, wide_valid, labels(0, 1, 2))
    torch.testing.assert_close(wide.logits_BC, narrow.logits_BC)
    alone = model(ids_BS[1:2, :2], valid_BS[1:2, :2], labels(1))
    torch.testing.assert_close(alone.logits_BC[0], narrow.logits_BC[1])
    assert narrow.moe is not None
    assert narrow.moe.assignments_E.sum(dim=1).tolist() == [11 * 2, 11 * 2], "padding goes to no expert"


@pytest.mark.parametrize("positions", POSITIONS)
def test_order_matters(positions: Any) -> None:
    model = build(replace(MODEL, positions=positions))
    ids_BS, valid_BS = tokens([6])
    given, turned = (model(ids, valid_BS, labels(0)).logits_BC for ids in (ids_BS, ids_BS.flip(1)))
    assert (given - turned).abs().max() > 1e-3


def test_rows_without_an_example_are_finite_and_count_for_nothing() -> None:
    for pooling in ("mean", "attention"):
        model = build(replace(MODEL, pooling=pooling))
        ids_BS, valid_BS = tokens([3, 0, 4])
        output = model(ids_BS, valid_BS, labels(1, NONE, 2))
        assert output.logits_BC.isfinite().all()
        assert float(output.num_targets) == 2
        rows = [model(ids_BS[[n]], valid_BS[[n]], labels(label)).lm_loss for n, label in ((0, 1), (2, 2))]
        torch.testing.assert_close(output.lm_loss, sum(rows) / 2)
        nothing = model(ids_BS[[1]], valid_BS[[1]], labels(NONE))
        assert float(nothing.lm_loss) == 0
        assert nothing.loss.isfinite()


def test_pooling_is_a_mean_of_positions() -> None:
    x_BSD = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    _, valid_BS = tokens([4, 2])
    mean = build().pooling(x_BSD, valid_BS)
    torch.testing.assert_close(mean[1], x_BSD[1, :2].mean(dim=0))
    weighted: Pooling = build(replace(MODEL, pooling="attention")).pooling
    assert weighted.query is not None
    with torch.no_grad():
        weighted.query.weight.zero_()  # all fit alike
    torch.testing.assert_close(weighted(x_BSD, valid_BS), mean)


def test_the_loss_adds_what_the_settings_weigh() -> None:
    ids_BS, valid_BS = tokens([5, 3])
    moe = replace(MOE, aux_loss_weight=0.5, z_loss_weight=0.25)
    model = build(replace(MODEL, label_smoothing=0.1), moe)
    output = model(ids_BS, valid_BS, labels(0, 2))
    expected = torch.nn.functional.cross_entropy(output.logits_BC, labels(0, 2))
    torch.testing.assert_close(output.lm_loss, expected)
    router = 0.5 * output.moe.aux_loss.sum() + 0.25 * output.moe.z_loss.sum()
    torch.testing.assert_close(output.loss, expected + router)
    assert router.item() > 0.1
    trained = model.train()(ids_BS, valid_BS, labels(0, 2))
    smoothed = torch.nn.functional.cross_entropy(trained.logits_BC, labels(0, 2), label_smoothing=0.1)
    torch.testing.assert_close(trained.loss, smoothed + router)
    torch.testing.assert_close(trained.lm_loss, expected)


def test_temperature_makes_the_router_less_certain() -> None:
    ids_BS, valid_BS = tokens([8, 8])
    cold, hot = (
        build(moe=replace(MOE, router_temperature=t))(ids_BS, valid_BS, labels(0, 1)).moe.entropy for t in (0.2, 5.0)
    )
    assert (hot > cold + 0.1).all()


def test_blanked_positions_in_training_alone() -> None:
    ids_BS, valid_BS = tokens([30])
    model = build(replace(MODEL, position_dropout=0.5))
    torch.testing.assert_close(model(ids_BS, valid_BS, labels(0)), build()(ids_BS, valid_BS, labels(0)))
    model.train()
    torch.manual_seed(0)
    first, second = (model(ids_BS, valid_BS, labels(0)).logits_BC for _ in range(2))
    assert (first - second).abs().max() > 1e-3


def test_features_enter_as_they_are() -> None:
    model = build(of_features=True)
    assert model.embedding is None
    features = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    _, valid_BS = tokens([5, 3])
    output = model(features, valid_BS, labels(0, 1))
    changed = features.clone()
    changed[1, 3:] = 100.0  # beyond the second sequence's end
    torch.testing.assert_close(model(changed, valid_BS, labels(0, 1)).logits_BC, output.logits_BC)


def test_an_embedding_that_begins_as_given() -> None:
    vectors = 0.01 * torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    weight = build(vectors_VI=vectors).embedding.weight.detach()
    torch.testing.assert_close(weight.std(), torch.tensor(12**-0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.corrcoef(torch.stack([weight.ravel(), vectors.ravel()]))[0, 1], torch.tensor(1.0))


def test_every_parameter_learns() -> None:
    model = build(replace(MODEL, pooling="attention", positions="learned", norm="layernorm")).train()
    ids_BS, valid_BS = tokens([20] * 8)
    model(ids_BS, valid_BS, torch.arange(8) % 3).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == []


@pytest.mark.parametrize("of_features", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_counts_are_those_of_the_module(enabled: bool, of_features: bool) -> None:
    kinds = itertools.product(("mean", "attention"), ("learned", "rotary"), ("pre", "post"), ("swiglu", "relu"), (1, 2))
    for pooling, positions, order, activation, every in kinds:
        model = replace(MODEL, pooling=pooling, positions=positions, norm_order=order, max_positions=7)
        moe = replace(MOE, enabled=enabled, activation=activation, every=every, expert_bias=enabled)
        built = build(model, moe, of_features=of_features)
        assert num_params(model, moe, of_features=of_features) == sum(p.numel() for p in built.parameters())
        unused = sum(p.numel() for name, p in built.named_parameters() if ".experts." in name) / 2
        assert (
            num_active_params(model, moe, of_features=of_features)
            == num_params(model, moe, of_features=of_features) - unused
        )


def test_flops_are_those_of_the_products() -> None:
    """Against torch's own counter, over all products of a forward pass."""
    dense = replace(MOE, enabled=False)
    ids_BS, valid_BS = tokens([6])
    for pooling in ("mean", "attention"):
        model = replace(MODEL, pooling=pooling)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            build(model, dense)(ids_BS, valid_BS, labels(0))
        assert counter.get_total_flops() == training_flops(model, dense, 6) / 3
    routers = 6 * 2 * 6 * MODEL.hidden_size * MOE.num_experts
    assert training_flops(MODEL, MOE, 6) == training_flops(MODEL, dense, 6) + routers


def test_settings_of_a_run_name_the_model() -> None:
    config = ClassifierConfig(model=MODEL, moe=ClassifierMoEConfig(backend="deepspeed", every=2))
    for kind, embedded in (("classifier", True), ("feature-classifier", False)):
        built = build_model(kind, to_dict(config))
        expected = build(MODEL, replace(config.moe, backend="custom"), of_features=not embedded)
        shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
        assert shapes == {name: tuple(p.shape) for name, p in expected.named_parameters()}
        assert ("embedding.weight" in shapes) == embedded
