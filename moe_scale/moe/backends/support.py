"""What each backend can do, as one function that the settings check and the tests both ask."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

from moe_scale.config import MoEConfig, show
from moe_scale.errors import Problem

CUSTOM_ONLY = {
    "kernels": "auto",
    "router": "softmax",
    "router_temperature": 1.0,
    "router_jitter": 0.0,
    "expert_bias": False,
    "expert_dropout": 0.0,
}
"""Settings that only the custom backend follows, with the value that the others have."""

TORCH_ONLY = {"expert_bias": False, "expert_dropout": 0.0}
"""Settings that the Triton kernels do not follow, with the value that they have."""


def unsupported(
    config: MoEConfig, *, zero_stage: int, on_cpu: bool = True, widths: Mapping[str, int] = MappingProxyType({})
) -> list[Problem]:
    """What ``config.backend`` cannot do of what is asked, each with the backend that can.

    Args:
        config: the sparse layers' settings.
        zero_stage: of the run.
        on_cpu: whether it runs on a CPU.
        widths: of the residual streams that have experts (D), by the settings that say them.
    """
    found: list[Problem] = []
    if not config.enabled:
        return found
    backend, where = config.backend, "moe.backend"
    if backend == "autoep" and not config.may_be_swiglu:
        what = f"autoep takes SwiGLU experts alone, and those of this recipe are {config.activation}"
        return [Problem(where, what, "use moe.backend custom or deepspeed")]
    if config.kernels == "triton" and backend == "custom":
        found += _triton_problems(config, on_cpu)
    elif not on_cpu and backend != "deepspeed":
        rows = "the grouped matrix product of a GPU wants rows of 16 bytes"
        found += [
            Problem(name, str(width), f"{rows}: choose a multiple of 8, or moe.backend deepspeed")
            for name, width in {"moe.intermediate_size": config.intermediate_size, **widths}.items()
            if width % 8
        ]
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
                "use ZeRO stage 3" + (", or moe.backend autoep at stages 1 and 2" if config.may_be_swiglu else ""),
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
                    "use moe.renormalize true, or moe.backend custom" + (" or autoep" if config.may_be_swiglu else ""),
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


def _triton_problems(config: MoEConfig, on_cpu: bool) -> list[Problem]:
    found: list[Problem] = []
    instead = "use moe.kernels torch"
    if find_spec("triton") is None:
        found.append(Problem("moe.kernels", "triton, which is not installed", f"install it, or {instead}"))
    elif on_cpu and os.environ.get("TRITON_INTERPRET") != "1":  # the tests' way to run them without a GPU
        found.append(Problem("moe.kernels", "triton on a CPU, where its kernels do not run", instead))
    for name, value in TORCH_ONLY.items():
        given = getattr(config, name)
        if given != value:
            what = f"{show(given)} with moe.kernels = triton, which has {show(value)} alone"
            found.append(Problem(f"moe.{name}", what, f"use moe.{name} {show(value)}, or moe.kernels torch"))
    if config.router == "expert_choice":
        what = "expert_choice with moe.kernels = triton, which needs a fixed number of experts per token"
        found.append(Problem("moe.router", what, f"choose another router, or {instead}"))
    return found
