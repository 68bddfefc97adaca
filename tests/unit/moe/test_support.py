"""Which combinations of backend, dispatch and ZeRO stage are refused, and what each refusal advises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from moe_scale.config import MoEConfig
from moe_scale.moe.backends import support
from moe_scale.moe.backends.support import CUSTOM_ONLY, unsupported


@pytest.mark.parametrize(
    ("changes", "stage", "where"),
    [
        ({}, 0, []),
        ({"backend": "custom", "ep_size": 2}, 3, []),
        ({"backend": "custom", "ep_size": 2}, 2, ["moe.ep_size"]),
        ({"backend": "custom", "dispatch": "capacity", "drop_policy": "probability", "renormalize": False}, 3, []),
        ({"backend": "deepspeed", "ep_size": 2}, 3, []),
        ({"backend": "deepspeed", "ep_size": 2}, 1, ["moe.ep_size"]),
        ({"backend": "deepspeed", "renormalize": False, "top_k": 2}, 3, ["moe.renormalize"]),
        ({"backend": "deepspeed", "renormalize": False, "top_k": 1}, 3, []),
        ({"backend": "deepspeed", "dispatch": "capacity", "top_k": 2}, 3, []),
        ({"backend": "deepspeed", "dispatch": "capacity", "top_k": 4}, 3, ["moe.drop_policy"]),
        ({"backend": "deepspeed", "dispatch": "capacity", "top_k": 4, "drop_policy": "probability"}, 3, []),
        ({"backend": "deepspeed", "dispatch": "capacity", "top_k": 2, "drop_policy": "probability"}, 3,
         ["moe.drop_policy"]),
        ({"backend": "deepspeed", "drop_policy": "probability"}, 3, []),
        ({"backend": "autoep", "ep_size": 2}, 1, []),
        ({"backend": "autoep", "ep_size": 2}, 2, []),
        ({"backend": "autoep", "ep_size": 2}, 3, []),
        ({"backend": "autoep", "ep_size": 2}, 0, ["moe.ep_size"]),
        ({"backend": "autoep", "ep_size": 1}, 0, []),
        ({"backend": "autoep", "dispatch": "capacity"}, 3, ["moe.dispatch"]),
        ({"backend": "autoep", "dispatch": "capacity", "ep_size": 2}, 0, ["moe.dispatch", "moe.ep_size"]),
        ({"backend": "custom", "conventions": "deepspeed"}, 0, []),
        ({"backend": "deepspeed", "conventions": "deepspeed"}, 0, []),
        ({"backend": "autoep", "conventions": "deepspeed"}, 0, ["moe.conventions"]),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], stage: int, where: list[str]) -> None:
    found = unsupported(MoEConfig(num_experts=8, **changes), zero_stage=stage)
    assert [problem.where for problem in found] == where
    assert all(problem.what and problem.allowed for problem in found)


def test_a_dense_model_uses_no_backend() -> None:
    config = MoEConfig(enabled=False, backend="autoep", dispatch="capacity", ep_size=2)
    assert unsupported(config, zero_stage=0) == []


def test_something_can_do_everything() -> None:
    """At ZeRO stage 3 the custom backend has no limits, so every refusal there can advise it."""
    for dispatch, policy, renormalize, top_k, ep_size in itertools.product(
        ("dropless", "capacity"), ("position", "probability"), (True, False), (1, 2, 4), (1, 2)
    ):
        config = MoEConfig(
            num_experts=8, dispatch=dispatch, drop_policy=policy, renormalize=renormalize, top_k=top_k, ep_size=ep_size
        )
        assert unsupported(config, zero_stage=3) == []
        for backend in ("deepspeed", "autoep"):
            for problem in unsupported(replace(config, backend=backend), zero_stage=3):
                assert "moe.backend custom" in problem.allowed


BACKENDS: tuple[Any, ...] = ("custom", "deepspeed", "autoep")
ALL_COMBINATIONS = {
    "router": ("softmax", "sigmoid"),
    "router_jitter": (0.0, 0.01),
    "expert_bias": (False, True),
    "activation": ("swiglu", "relu"),
    "conventions": ("moe_scale", "deepspeed"),
    "dispatch": ("dropless", "capacity"),
    "drop_policy": ("position", "probability"),
    "renormalize": (True, False),
    "top_k": (1, 2, 4),
    "intermediate_size": (64, 60),
    "ep_size": (1, 2),
}


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_refusal_names_the_backend_that_can(stage: int, on_cpu: bool) -> None:
    """In every combination: following the advice takes the problem away, and none is named only where none can."""
    seen: set[str] = set()
    for values in itertools.product(*ALL_COMBINATIONS.values()):
        config = MoEConfig(num_experts=8, **dict(zip(ALL_COMBINATIONS, values, strict=True)))
        if config.problems("moe"):
            continue
        refused = {
            backend: {
                p.where: p for p in unsupported(replace(config, backend=backend), zero_stage=stage, on_cpu=on_cpu)
            }
            for backend in BACKENDS
        }
        for backend, problems in refused.items():
            for where, problem in problems.items():
                seen.add(where)
                _, _, advice = problem.allowed.partition("moe.backend ")
                named = [other for other in BACKENDS if other in advice]
                if where == "moe.ep_size" and stage == 0:
                    assert all(where in others for others in refused.values()), "spreading experts takes ZeRO"
                    continue
                assert named, f"{problem}, and others can: {[b for b in BACKENDS if where not in refused[b]]}"
                assert backend not in named
                assert not any(where in refused[other] for other in named), str(problem)
    expected = {f"moe.{name}" for name in ALL_COMBINATIONS if name != "top_k"}
    expected -= {"moe.ep_size"} if stage == 3 else set()
    expected -= {"moe.intermediate_size"} if on_cpu else set()
    assert seen == expected, "every kind of refusal is met"


# --- settings that only the custom backend follows

OTHER_VALUES: dict[str, Any] = {
    "kernels": "torch",
    "router": "sigmoid", "router_temperature": 2.0, "router_jitter": 0.01, "expert_bias": True, "expert_dropout": 0.1,
}  # fmt: skip


def test_every_custom_only_setting_is_tested_and_a_default() -> None:
    """The value that the other backends have is the default, so that naming one of them is enough."""
    assert set(OTHER_VALUES) == set(CUSTOM_ONLY)
    assert {name: getattr(MoEConfig(), name) for name in CUSTOM_ONLY} == CUSTOM_ONLY


@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_custom_only_settings_are_refused_by_the_others(name: str, value: Any, backend: Any) -> None:
    config = MoEConfig(**{name: value})
    assert unsupported(config, zero_stage=3) == []
    (problem,) = unsupported(replace(config, backend=backend), zero_stage=3)
    assert problem.where == f"moe.{name}"
    assert f"moe.backend = {backend}" in problem.what
    assert str(value).lower() in problem.what
    assert f"moe.{name} {str(CUSTOM_ONLY[name]).lower()}," in problem.allowed
    assert "moe.backend custom" in problem.allowed
    assert unsupported(replace(config, backend=backend, enabled=False), zero_stage=3) == []


@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
@pytest.mark.parametrize("router", ["noisy", "sigmoid", "hash", "expert_choice"])
def test_every_router_but_softmax_is_refused_by_the_others(router: Any, backend: Any) -> None:
    config = MoEConfig(router=router, backend=backend)
    assert [problem.where for problem in unsupported(config, zero_stage=3)] == ["moe.router"]


@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
def test_everything_unsupported_is_reported_at_once(backend: Any) -> None:
    found = unsupported(MoEConfig(backend=backend, **OTHER_VALUES), zero_stage=3)
    assert [problem.where for problem in found] == [f"moe.{name}" for name in CUSTOM_ONLY]


@pytest.mark.parametrize("backend", ["deepspeed", "autoep"])
@pytest.mark.parametrize(
    "changes",
    [{"shared_intermediate_size": 8}, {"residual": True}, {"router_init_scale": 0.1}, {"bias_update_rate": 0.1},
     {"aux_loss_scope": "sequence"}, {"aux_loss_scope": "global"}],
)  # fmt: skip
def test_dense_halves_and_losses_are_for_every_backend(backend: Any, changes: dict[str, Any]) -> None:
    assert unsupported(MoEConfig(backend=backend, **changes), zero_stage=3) == []


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_autoep_takes_swiglu_experts_alone(activation: Any) -> None:
    config = MoEConfig(activation=activation)
    (problem,) = unsupported(replace(config, backend="autoep"), zero_stage=3)
    assert (problem.where, "deepspeed" in problem.allowed) == ("moe.activation", True)
    assert unsupported(replace(config, backend="deepspeed"), zero_stage=3) == []


@pytest.mark.parametrize("backend", ["custom", "autoep"])
def test_widths_that_a_gpus_grouped_product_does_not_take(backend: Any) -> None:
    config = MoEConfig(backend=backend, intermediate_size=12)
    widths = {"model.text_width": 1028, "model.fusion_width": 64}
    found = unsupported(config, zero_stage=3, on_cpu=False, widths=widths)
    assert [problem.where for problem in found] == ["moe.intermediate_size", "model.text_width"]
    assert all("choose a multiple of 8, or moe.backend deepspeed" in problem.allowed for problem in found)
    assert unsupported(config, zero_stage=3, widths=widths) == []
    assert unsupported(replace(config, backend="deepspeed"), zero_stage=3, on_cpu=False, widths=widths) == []


# --- the Triton kernels


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, []),
        ({"ep_size": 2, "activation": "gelu", "dispatch": "capacity", "intermediate_size": 30}, []),
        ({"expert_bias": True}, ["moe.expert_bias"]),
        ({"expert_dropout": 0.1}, ["moe.expert_dropout"]),
        ({"router": "expert_choice"}, ["moe.router"]),
        ({"expert_bias": True, "expert_dropout": 0.1}, ["moe.expert_bias", "moe.expert_dropout"]),
    ],
)
def test_what_triton_kernels_refuse_on_a_gpu(
    changes: dict[str, Any], where: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    config = MoEConfig(kernels="triton", **changes)
    found = unsupported(config, zero_stage=3, on_cpu=False)
    assert [problem.where for problem in found] == where
    assert all("moe.kernels torch" in problem.allowed for problem in found)
    assert unsupported(replace(config, kernels="torch"), zero_stage=3) == []


def test_triton_kernels_want_triton_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEConfig(kernels="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    (problem,) = unsupported(config, zero_stage=3, on_cpu=True)
    assert (problem.where, "on a CPU" in problem.what) == ("moe.kernels", True)
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    (problem,) = unsupported(config, zero_stage=3, on_cpu=False)
    assert "not installed" in problem.what
    assert unsupported(replace(config, kernels="auto"), zero_stage=3, on_cpu=False) == []
