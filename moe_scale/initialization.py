"""Seeded initialization that does not depend on how the model is spread over ranks.

Every parameter draws from its own generator, seeded by the run's seed and the parameter's path. So a weight has the
same initial value whatever the number of ranks, the expert-parallel size, the MoE backend and the order in which
modules are built, and two runs that differ in one of these can be compared step by step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Init:
    """A seed and the path of the module that is being built; ``init / "name"`` descends.

    Attributes:
        gain: factor on every standard deviation from here down.
    """

    seed: int
    path: str = ""
    gain: float = 1.0

    def __truediv__(self, name: object) -> Init:
        return replace(self, path=f"{self.path}.{name}" if self.path else str(name))

    def normal_(self, tensor: torch.Tensor, std: float) -> torch.Tensor:
        """Fill ``tensor`` in place from a normal distribution of ``gain * std`` cut at three standard deviations.

        Call it in the ``__init__`` of the module that creates the parameter: under ``zero.Init`` the parameter is
        sharded when that returns, and nothing would be left here to fill.
        """
        assert not hasattr(tensor, "ds_id"), f"{self.path} was sharded before it was initialized"
        if tensor.is_meta:
            return tensor
        digest = hashlib.blake2b(f"{self.seed}/{self.path}".encode(), digest_size=8).digest()
        generator = torch.Generator(device=tensor.device)
        generator.manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
        std *= self.gain
        # Drawn in fp32, so that the values agree between precisions up to rounding. Not by torch.empty: zero.Init makes
        # it give bf16 whatever it is asked for, and a draw in bf16 is a coarse one.
        draw = torch.empty_like(tensor, dtype=torch.float32, memory_format=torch.contiguous_format)
        torch.nn.init.trunc_normal_(draw, std=std, a=-3 * std, b=3 * std, generator=generator)
        with torch.no_grad():
            return tensor.copy_(draw)
