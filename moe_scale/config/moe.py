"""Settings of the mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_scale.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    divisors,
    setting,
    show,
)
from moe_scale.errors import Problem


@dataclass(frozen=True)
class MoEConfig(Strict):
    """The mixture-of-experts layer (Switch, arXiv 2101.03961; ST-MoE, arXiv 2202.08906)."""

    may_be_swiglu: ClassVar[bool] = True
    """Whether the experts of this recipe can have the activation ``swiglu``."""

    enabled: bool = setting(True, "sparse feed-forwards; false gives a dense model, as moe.dense_size says")
    dense_size: Literal["active", "total"] = setting(
        "active",
        "with moe.enabled false: feed-forwards as wide as the experts that a token uses (active: equal FLOPs), or as "
        "all experts together (total: equal parameters)",
    )
    backend: Literal["custom", "deepspeed", "autoep"] = setting(
        "custom",
        "who computes the layer: custom (this project), deepspeed (deepspeed.moe) or autoep (DeepSpeed's AutoEP)",
    )
    conventions: Literal["moe_scale", "deepspeed"] = setting(
        "moe_scale",
        "whose rules hold where the two differ; deepspeed: capacity, drops, rescaling after drops and the balancing "
        "loss are those of deepspeed.moe, in the backends custom and deepspeed",
    )
    kernels: Literal["auto", "torch", "triton"] = setting(
        "auto",
        "backend custom: the experts by torch's matrix products, or by Triton kernels that gather and combine too, on "
        "a GPU; auto is torch, and on a CPU in bf16 a kernel compiled here, where there are g++, AVX512-BF16, no AMX "
        "and widths that are multiples of 32",
    )
    num_experts: PositiveInt = setting(64, "experts per layer (E)")
    top_k: PositiveInt = setting(2, "experts that each token is sent to (K)")
    intermediate_size: PositiveInt = setting(512, "hidden width of one expert (F)")
    activation: Literal["swiglu", "gelu", "relu"] = setting("swiglu", "of the experts; swiglu is gated, the others not")
    expert_bias: bool = setting(False, "biases in the experts' two maps")
    shared_intermediate_size: NonNegativeInt = setting(
        0, "hidden width of a shared expert that every token passes as well (arXiv 2401.06066); 0 means none"
    )
    residual: bool = setting(
        False, "Residual MoE (arXiv 2201.05596): mix a dense feed-forward and the experts by a learned softmax"
    )
    every: PositiveInt = setting(1, "every n-th layer is sparse, counted from the end of each group of n; 1 = all")
    router: Literal["softmax", "noisy", "sigmoid", "expert_choice", "hash"] = setting(
        "softmax",
        "softmax; noisy (top-k of noised scores, arXiv 1701.06538); sigmoid (its selection bias evens the load; set "
        "moe.aux_loss_weight 0 to rely on it alone, arXiv 2408.15664); expert_choice (experts pick tokens, arXiv "
        "2202.09368); hash (fixed by the token's id, arXiv 2106.04426)",
    )
    router_temperature: PositiveFloat = setting(1.0, "the router's scores are divided by it")
    router_init_scale: PositiveFloat = setting(
        1.0, "factor on the initial router weights; the scale of 0.1 that Switch uses is a factor of 0.32"
    )
    router_jitter: Fraction = setting(
        0.0, "in training the router's input is multiplied by U(1 - j, 1 + j); Switch: 0.01"
    )
    expert_dropout: Fraction = setting(0.0, "dropout inside the experts; Switch uses 0.4 in fine-tuning")
    bias_update_rate: NonNegativeFloat = setting(
        0.001, "router sigmoid: after a step each expert's selection bias moves by this much towards an even load"
    )
    renormalize: bool = setting(True, "rescale each token's K routing weights to sum to 1 (no effect for top_k 1)")
    dispatch: Literal["dropless", "capacity"] = setting(
        "dropless",
        "dropless: experts take all tokens sent to them; capacity: at most capacity_factor times their share",
    )
    capacity_factor: PositiveFloat = setting(
        1.0, "with dispatch=capacity: rows per expert = ceil(tokens * top_k / num_experts * capacity_factor)"
    )
    eval_capacity_factor: PositiveFloat = setting(2.0, "the same at evaluation")
    min_capacity: PositiveInt = setting(4, "with dispatch=capacity: rows per expert, at least")
    drop_policy: Literal["position", "probability"] = setting(
        "position",
        "with dispatch=capacity: who stays: first choices, in token order, before second ones (position), or the most "
        "probable",
    )
    aux_loss_weight: NonNegativeFloat = setting(0.001, "weight of the load-balancing loss E * sum_e f_e * P_e")
    aux_loss_scope: Literal["micro_batch", "sequence", "global"] = setting(
        "micro_batch",
        "whose load is balanced: one rank's micro-batch, each sequence, or the micro-batches of all ranks",
    )
    z_loss_weight: NonNegativeFloat = setting(0.001, "weight of the router z-loss mean(logsumexp(logits)^2)")
    ep_size: NonNegativeInt = setting(
        1, "ranks that share one copy of the experts (expert parallelism); 0 takes as many as a node's ranks allow"
    )

    def problems(self, where: str) -> list[Problem]:
        found: list[Problem] = []
        if not self.enabled:
            return found
        if self.top_k > self.num_experts:
            found.append(
                Problem(
                    f"{where}.top_k",
                    f"{self.top_k} > {where}.num_experts = {self.num_experts}",
                    f"choose {'1' if self.num_experts == 1 else f'1 to {self.num_experts}'}",
                )
            )
        if self.ep_size and self.num_experts % self.ep_size:
            found.append(
                Problem(
                    f"{where}.ep_size",
                    f"{self.ep_size} does not divide {where}.num_experts = {self.num_experts}",
                    f"choose one of {divisors(self.num_experts)}",
                )
            )
        if self.residual and self.shared_intermediate_size:
            found.append(
                Problem(
                    f"{where}.residual",
                    f"true with {where}.shared_intermediate_size = {self.shared_intermediate_size}",
                    "choose a Residual MoE or a shared expert",
                )
            )
        if not self.renormalize and self.router in ("noisy", "expert_choice", "hash"):
            found.append(
                Problem(f"{where}.renormalize", f"false with {where}.router = {self.router}", "it has no effect there")
            )
        if self.conventions == "deepspeed":
            found += self._deepspeed_problems(where)
        if self.router == "expert_choice" and self.dispatch != "capacity":
            found.append(
                Problem(
                    f"{where}.router",
                    f"expert_choice with {where}.dispatch = {self.dispatch}",
                    f"experts choose as many tokens as they have capacity: set {where}.dispatch capacity",
                )
            )
        return found

    def every_problems(self, where: str, layers: str, number: int) -> list[Problem]:
        """Whether a stack of ``number`` layers, as the setting ``layers`` says, has a sparse one."""
        if not self.enabled or self.every <= number:
            return []
        what = f"{self.every} > {layers} = {number}: no layer is sparse"
        return [Problem(f"{where}.every", what, f"choose 1 to {number}, or {where}.enabled false")]

    def dense_size_problems(self, where: str, layers: str, number: int) -> list[Problem]:
        """Whether a dense model of equal parameters can be had: its layers share a group's parameters evenly.

        Args:
            layers: dotted name of the number of layers.
            number: of them.
        """
        if self.enabled or self.dense_size == "active" or number % self.every == 0:
            return []
        what = f"total with {where}.every = {self.every}, which does not divide {layers} = {number}"
        allowed = f"the last layers would be too wide: choose {where}.every of {divisors(number)}"
        return [Problem(f"{where}.dense_size", what, allowed)]

    def _deepspeed_problems(self, where: str) -> list[Problem]:
        """Settings that ``deepspeed.moe`` has no choice of."""
        its_own = {
            "router": "softmax",
            "aux_loss_scope": "micro_batch",
            **({"renormalize": True} if self.top_k > 1 else {}),
            **({"drop_policy": self.deepspeed_drop_policy} if self.dispatch == "capacity" else {}),
        }
        return [
            Problem(
                f"{where}.{name}",
                f"{show(getattr(self, name))} with {where}.conventions = deepspeed and top_k = {self.top_k}",
                f"deepspeed.moe has {where}.{name} {show(value)} alone; or use {where}.conventions moe_scale",
            )
            for name, value in its_own.items()
            if getattr(self, name) != value
        ]

    @property
    def deepspeed_drop_policy(self) -> Literal["position", "probability"]:
        """How ``deepspeed.moe`` chooses whom it drops."""
        return "position" if self.top_k <= 2 else "probability"
