"""What each backend can do, as one function that the settings check and the tests both ask."""

from __future__ import annotations

from moe_scale.config import MoEConfig, show
from moe_scale.errors import Problem

CUSTOM_ONLY = {
    "router": "softmax",
    "router_temperature": 1.0,
    "router_jitter": 0.0,
    "expert_bias": False,
    "expert_dropout": 0.0,
}
"""Settings that only the custom backend follows, with the value that the others have."""


def unsupported(config: MoEConfig, *, zero_stage: int, on_cpu: bool = True) -> list[Problem]:
    """What ``config.backend`` cannot do of what is asked, each with the backend that can."""
    found: list[Problem] = []
    if not config.enabled:
        return found
    backend, where = config.backend, "moe.backend"
    if not on_cpu and backend != "deepspeed" and config.intermediate_size % 8:
        found.append(
            Problem(
                "moe.intermediate_size",
                f"{config.intermediate_size}",
                "the grouped matrix product of a GPU wants rows of 16 bytes: choose a multiple of 8, or moe.backend "
                "deepspeed",
            )
        )
    if backend != "custom":
        for name, value in CUSTOM_ONLY.items():
            given = getattr(config, name)
            if given != value:
                found.append(
                    Problem(
                        f"moe.{name}",
                        f"{show(given)} with {where} = {backend}, which has {show(value)} alone",
                        f"use moe.{name} {show(value)}, or moe.backend custom",
                    )
                )
    if config.ep_size > 1 and zero_stage < 3 and backend != "autoep":
        found.append(
            Problem(
                "moe.ep_size",
                f"{config.ep_size} at ZeRO stage {zero_stage} with {where} = {backend}",
                "use ZeRO stage 3, or moe.backend autoep at stages 1 and 2",
            )
        )
    if backend == "autoep":
        if config.conventions != "moe_scale":
            found.append(
                Problem(
                    "moe.conventions",
                    f"{config.conventions} with {where} = autoep, which has rules of its own",
                    "use moe.conventions moe_scale, or moe.backend custom or deepspeed",
                )
            )
        if config.activation != "swiglu":
            found.append(
                Problem(
                    "moe.activation",
                    f"{config.activation} with {where} = autoep, which takes SwiGLU experts alone",
                    "use moe.activation swiglu, or moe.backend custom or deepspeed",
                )
            )
        if config.dispatch != "dropless":
            found.append(
                Problem(
                    "moe.dispatch",
                    f"{config.dispatch} with {where} = autoep, which is always dropless",
                    "use moe.dispatch dropless, or moe.backend custom or deepspeed",
                )
            )
        if config.ep_size > 1 and zero_stage == 0:
            found.append(
                Problem(
                    "moe.ep_size", f"{config.ep_size} at ZeRO stage 0 with {where} = autoep", "use ZeRO stage 1, 2 or 3"
                )
            )
    # Asked for its own conventions, MoEConfig.problems says the same, for every backend.
    if backend == "deepspeed" and config.conventions != "deepspeed":
        if not config.renormalize and config.top_k > 1:
            found.append(
                Problem(
                    "moe.renormalize",
                    f"false with {where} = deepspeed, which always rescales for top_k > 1",
                    "use moe.renormalize true, or moe.backend custom or autoep",
                )
            )
        its_policy = config.deepspeed_drop_policy
        if config.dispatch == "capacity" and config.drop_policy != its_policy:
            found.append(
                Problem(
                    "moe.drop_policy",
                    f"{config.drop_policy} with {where} = deepspeed, which drops by {its_policy} for top_k = "
                    f"{config.top_k}",
                    f"use moe.drop_policy {its_policy}, or moe.backend custom",
                )
            )
    return found
