"""Settings of low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

from moe_scale.config.base import Fraction, NonNegativeInt, PositiveFloat, Strict, setting
from moe_scale.config.moe import MoEConfig
from moe_scale.errors import Problem


@dataclass(frozen=True)
class LoRAConfig(Strict):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the model stays as it is, and small matrices beside it learn."""

    rank: NonNegativeInt = setting(0, "rank of the adapters (r); 0 means none, and the whole model is trained")
    alpha: PositiveFloat = setting(16.0, "an adapter's output is multiplied by alpha / rank")
    dropout: Fraction = setting(0.0, "of an adapter's input, in training")
    targets: tuple[str, ...] = setting(
        ("*_proj", "query", "key_value", "out"),
        "linear layers, and maps of experts, that get an adapter, by the end of their dotted names; * stands for any "
        "characters, as in image.*.q_proj",
    )
    also_trained: tuple[str, ...] = setting(
        (), "modules that are trained whole beside the adapters, by the end of their dotted names, as head"
    )

    @property
    def enabled(self) -> bool:
        return self.rank > 0

    def problems(self, where: str) -> list[Problem]:
        if self.enabled and not self.targets:
            return [Problem(f"{where}.targets", "none, with adapters to be trained", "name linear layers, as query")]
        return []

    def moe_problems(self, moe: MoEConfig) -> list[Problem]:
        """Whether sparse layers take adapters, and stay as they are while these are trained."""
        found: list[Problem] = []
        if not (self.enabled and moe.enabled):
            return found
        if moe.backend != "custom":
            what = f"{moe.backend} with lora.rank = {self.rank}: its layers take no adapters"
            found.append(Problem("moe.backend", what, "use moe.backend custom"))
        if moe.router == "sigmoid" and moe.bias_update_rate:
            what = f"{moe.bias_update_rate:g} with lora.rank = {self.rank}, which leaves the model as it is"
            found.append(Problem("moe.bias_update_rate", what, "choose 0"))
        return found


@dataclass(frozen=True)
class DecoderLoRAConfig(LoRAConfig):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the model stays as it is, and small matrices beside it learn."""

    targets: tuple[str, ...] = setting(
        ("attention.*",),
        "what gets an adapter, by the end of its dotted name, where * stands for any characters: attention.qkv, "
        "attention.out, attention.gate, router, experts.gate_up, experts.down, dense.* (a shared expert), ffn.*",
    )
