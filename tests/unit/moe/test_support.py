"""Which combinations of backend, dispatch and ZeRO stage are refused, and what each refusal advises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from moe_scale.config import MoEConfig
from moe_scale.moe.backends.support import unsupported


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
