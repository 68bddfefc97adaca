"""What is planned: a recipe's run on a cluster, with the parameters of the very modules that the run would build.

The model is built on the meta device by the recipe's own task, with the experts of one rank, so that shapes and names
follow the code. Every rank holds parameters of the same shapes; what differs is which experts they are.
:class:`Variants` are runs that are spread in other ways, on the same cluster or on others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_scale.errors import Problem, raise_if
from moe_scale.moe.backends.support import unsupported
from moe_scale.parallel.ds_json import DeepSpeedPlan
from moe_scale.parallel.ds_json import plan as check_deepspeed
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.parallel.launch import Launch
from moe_scale.parallel.zero import is_expert_parallel
from moe_scale.planner.cluster import Cluster
from moe_scale.train.optim import optimizer_problems, parameter_groups, part_of
from moe_scale.train.recipe import Recipe, read_run

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one number."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank, before ZeRO shards it.

    Attributes:
        name: in the model.
        shape: of this rank's part; of expert-parallel parameters the first dimension counts the local experts.
        part: of :data:`moe_scale.train.optim.PARTS`.
        expert_parallel: whether it is sharded over the expert-data group rather than over all ranks.
        group: number of its optimizer group.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    expert_parallel: bool
    group: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Subject:
    """A run on a cluster.

    Attributes:
        recipe: its name.
        kind: of its model, as :attr:`moe_scale.train.task.Task.model_kind`.
        tokens_per_sequence: of a micro-batch, as the task counts them.
        config: the run's settings.
        plan: the checked DeepSpeed configuration.
        cluster: the machine.
        parameters: of one rank, in the order of ``model.named_parameters()``.
    """

    recipe: str
    kind: str
    tokens_per_sequence: int
    config: Any
    plan: DeepSpeedPlan
    cluster: Cluster
    parameters: tuple[Parameter, ...]

    @property
    def is_decoder(self) -> bool:
        """Whether activations, traffic and time are modelled, rather than model states alone."""
        return self.kind == "decoder"

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def ep_size(self) -> int:
        return self.config.moe.ep_size if self.config.moe.enabled else 1

    @property
    def zero(self) -> dict[str, Any]:
        """The section ``zero_optimization`` of the DeepSpeed JSON."""
        return self.plan.json.get("zero_optimization", {})

    @property
    def bytes_per_value(self) -> int:
        """Of weights and activations."""
        return BYTES[self.plan.precision]

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch of one rank."""
        return self.plan.micro_batch * self.tokens_per_sequence

    @property
    def tokens_per_step(self) -> int:
        return self.tokens * self.plan.grad_accum * self.world_size

    def shard_ranks(self, parameter: Parameter) -> int:
        """Ranks that ZeRO shards the parameter over."""
        return self.world_size // self.ep_size if parameter.expert_parallel else self.world_size

    def shard(self, parameter: Parameter) -> int:
        """Elements of the parameter's shard at stage 3, padding included."""
        return -(-parameter.numel // self.shard_ranks(parameter))

    def offloads(self, part: str) -> bool:
        """Whether ``part`` (optimizer or param) is kept in host memory."""
        return (self.zero.get(f"offload_{part}") or {}).get("device", "none") != "none"

    def global_params(self, active: bool = False) -> dict[str, int]:
        """Parameters of the whole model by part; with ``active`` those that one token uses."""
        moe = self.config.moe
        found: dict[str, int] = {}
        for p in self.parameters:
            experts = p.part == "experts"
            count = p.numel * (self.ep_size if p.expert_parallel else 1)
            if active and experts:
                count = count * moe.top_k // moe.num_experts
            found[p.part] = found.get(p.part, 0) + count
        return found


def read_subject(recipe: Recipe, argv: list[str], cluster: Cluster) -> Subject:
    """The run that a recipe and its command line describe, on ``cluster``.

    Raises:
        ConfigError: with every reason why such a run would not start, and for what is not modelled.
    """
    launch = Launch(0, cluster.world_size, 0, cluster.devices_per_node, "none")
    config, plan, problems = read_run(recipe, argv, launch, cluster.device)
    problems += not_modelled(config, {} if problems else plan.json)
    raise_if(problems)
    task = recipe.task(config)
    parameters = model_parameters(recipe, config, cluster.world_size)
    return Subject(recipe.name, task.model_kind, task.tokens_per_sequence, config, plan, cluster, parameters)


ZERO_PLUS_PLUS = (
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "mics_shard_size",
)
"""Settings of ZeRO++ (arXiv 2306.10209) and MiCS (arXiv 2205.00119), which change what ranks hold and send."""


def not_modelled(config: Any, deepspeed: dict[str, Any]) -> list[Problem]:
    """Runs that train, but whose costs are not known here.

    Args:
        deepspeed: the run's DeepSpeed JSON.
    """
    found = []
    zero = deepspeed.get("zero_optimization") or {}
    for name in ZERO_PLUS_PLUS:
        value = zero.get(name)
        if value is True or (value and value not in (1, -1)):
            what = f"{value}: its memory and traffic are not modelled"
            found.append(Problem(f"zero_optimization.{name}", what, "plan without it"))
    if ((zero.get("offload_param") or {}).get("device") or "none") != "none":
        what = "the time of parameters that come from host memory or disk is not modelled"
        found.append(Problem("zero_optimization.offload_param", what, "plan without it"))
    if config.moe.enabled and config.moe.backend != "custom":
        what = f"{config.moe.backend}: memory and time are modelled for the custom backend alone"
        found.append(Problem("moe.backend", what, "plan with moe.backend custom"))
    if (lora := getattr(config, "lora", None)) and lora.enabled:
        what = f"{lora.rank}: what DeepSpeed holds of weights that are frozen is not modelled"
        found.append(Problem("lora.rank", what, "plan with lora.rank 0"))
    return found


def decoder_problems(subject: Subject) -> list[Problem]:
    """What a run lacks for its activations, traffic and time to be known."""
    if subject.is_decoder:
        return []
    what = f"{subject.recipe}, whose model is no decoder: its model states alone are modelled"
    return [Problem("recipe", what, "choose recipes/lm_16l.py")]


def model_parameters(recipe: Recipe, config: Any, world_size: int) -> tuple[Parameter, ...]:
    """The parameters that one rank's model has, from the model itself on the meta device."""
    ep_size = config.moe.ep_size if config.moe.enabled else 1
    groups = ParallelGroups(world_size, 0, ep_size, 0)
    # The CPU's kernels have the same parameters as a GPU's; a choice that this machine lacks must not matter.
    task = recipe.task(replace(config, moe=replace(config.moe, kernels="auto")))
    with torch.device("meta"):
        model = task.build_model(groups)
    group_of = {
        id(parameter): number
        for number, group in enumerate(parameter_groups(model, config.optim.weight_decay))
        for parameter in group["params"]
    }
    return tuple(
        Parameter(name, tuple(p.shape), part_of(name), is_expert_parallel(p), group_of[id(p)])
        for name, p in model.named_parameters()
    )


@dataclass(frozen=True)
class Sharding:
    """How a run's model states are spread over the ranks, and whether the optimizer's are in host memory."""

    stage: int
    ep_size: int
    offload: bool

    def __str__(self) -> str:
        return f"ZeRO-{self.stage}, ep {self.ep_size}{', offloaded' if self.offload else ''}"

    @property
    def method(self) -> str:
        """Without the ranks that share the experts, of which there can be more or fewer."""
        return f"ZeRO-{self.stage}{', offloaded' if self.offload else ''}"


class Variants:
    """Runs that differ from a subject's in how they are spread, each checked as a run is before it starts."""

    def __init__(self, recipe: Recipe, subject: Subject):
        self.recipe, self.subject = recipe, subject
        self._parameters = {subject.ep_size: subject.parameters}

    def make(
        self,
        sharding: Sharding,
        *,
        micro_batch: int | None = None,
        checkpointing: bool | None = None,
        cluster: Cluster | None = None,
    ) -> tuple[Subject | None, str]:
        """The run with another sharding.

        Args:
            micro_batch: sequences of a micro-batch of a rank, at the same sequences of a rank a step.
            checkpointing: whether activations are recomputed.
            cluster: another machine.
            What is None stays as it is in the subject's run.

        Returns:
            the run, or None; and why there is no such run.
        """
        subject = self.subject
        cluster, micro_batch = cluster or subject.cluster, micro_batch or subject.plan.micro_batch
        sequences = subject.plan.micro_batch * subject.plan.grad_accum
        if sequences % micro_batch:
            return None, f"micro-batch {micro_batch} does not divide {sequences} sequences a rank"
        config = subject.config
        changes = _deepspeed_changes(sharding, subject, micro_batch, sequences // micro_batch)
        config = replace(
            config,
            deepspeed_override=(*config.deepspeed_override, *changes),
            moe=replace(config.moe, ep_size=sharding.ep_size),
        )
        if checkpointing is not None:
            config = replace(config, model=replace(config.model, activation_checkpointing=checkpointing))
        launch = Launch(0, cluster.world_size, 0, cluster.devices_per_node, "none")
        plan, problems = check_deepspeed(config, launch, cluster.device)
        widths = config.expert_widths
        problems += unsupported(config.moe, zero_stage=plan.stage, on_cpu=cluster.is_cpu, widths=widths)
        problems += optimizer_problems(config.optim, offload=plan.offload)
        if problems:
            return None, "; ".join(f"{p.where}: {p.what}" for p in config.in_own_words(problems))
        if sharding.ep_size not in self._parameters:
            self._parameters[sharding.ep_size] = model_parameters(self.recipe, config, cluster.world_size)
        parameters = self._parameters[sharding.ep_size]
        return replace(subject, config=config, plan=plan, cluster=cluster, parameters=parameters), ""


def _deepspeed_changes(sharding: Sharding, subject: Subject, micro_batch: int, grad_accum: int) -> list[str]:
    """The changes of a subject's DeepSpeed JSON, as ``--deepspeed_override`` has them."""
    changes = [
        f"zero_optimization.stage={sharding.stage}",
        f"train_micro_batch_size_per_gpu={micro_batch}",
        f"gradient_accumulation_steps={grad_accum}",
    ]
    if sharding.offload:
        changes.append('zero_optimization.offload_optimizer={"device": "cpu"}')
    elif subject.offloads("optimizer"):
        changes.append("zero_optimization.offload_optimizer=null")
    return changes
