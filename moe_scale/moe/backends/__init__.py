"""The MoE layer behind one setting, ``moe.backend``. All backends take and return the same."""

from __future__ import annotations

from torch import nn

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups


def build_moe(
    config: MoEConfig, d_model: int, groups: ParallelGroups, init: Init, depth_scale: float = 1.0
) -> nn.Module:
    """The layer that ``config.backend`` names: (x_BSD, valid_BS) -> (y_BSD, MoEStats).

    The weights that a seed gives are the same for all backends.
    """
    if config.backend == "deepspeed":
        from moe_scale.moe.backends.deepspeed import DeepSpeedMoE

        return DeepSpeedMoE(config, d_model, groups, init, depth_scale)
    if config.backend == "autoep":
        from moe_scale.moe.backends.autoep import AutoEPMoE

        return AutoEPMoE(config, d_model, init, depth_scale)
    return MoELayer(config, d_model, groups, init, depth_scale)
