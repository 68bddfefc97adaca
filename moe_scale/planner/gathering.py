"""When ZeRO-3 gathers parameters and when it lets them go: how often each is gathered, and how much is held at once.

DeepSpeed gathers a module's parameters before the module runs, and ahead of that what ``stage3_prefetch_bucket_size``
allows. Afterwards it lets them go, unless they are used again within ``stage3_max_reuse_distance`` elements or the
prefetch has counted on them. This follows ``PartitionedParameterCoordinator`` of DeepSpeed 0.19.8 over one micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from moe_scale.models.layers import is_sparse
from moe_scale.planner.model import Parameter, Subject

PREFETCH, REUSE, LIVE, PERSIST = (
    "stage3_prefetch_bucket_size",
    "stage3_max_reuse_distance",
    "stage3_max_live_parameters",
    "stage3_param_persistence_threshold",
)
DEFAULTS = {
    PREFETCH: 50_000_000,
    REUSE: 1_000_000_000,
    LIVE: 1_000_000_000,
    PERSIST: 100_000,
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
}
"""DeepSpeed's own, in elements."""


@dataclass(frozen=True)
class Gathering:
    """What one micro-batch gathers of the parameters that are not persistent.

    Attributes:
        forward, backward: parameters gathered in each pass, one entry a time.
        forward_calls, backward_calls: how often it is gathered, several parameters a time.
        peak_numel: most elements that are gathered at once; a shard that is the whole is not gathered.
    """

    forward: tuple[Parameter, ...]
    backward: tuple[Parameter, ...]
    forward_calls: int
    backward_calls: int
    peak_numel: int


def setting(subject: Subject, name: str) -> int:
    """A number of the section ``zero_optimization``, or DeepSpeed's default of it."""
    return int(subject.zero.get(name, DEFAULTS[name]))


def is_persistent(subject: Subject, parameter: Parameter) -> bool:
    """Whether stage 3 keeps the parameter whole on every rank between uses."""
    return parameter.numel <= setting(subject, PERSIST)


def most_gathered(subject: Subject) -> int:
    """Elements that stage 3 gathers at once at most, in whatever order the modules of a model run.

    Fetching ahead stops at ``stage3_max_live_parameters``; beyond that is held what is used again within
    ``stage3_max_reuse_distance``, a stretch that ends with a whole module, and what the present module needs.
    """
    modules: dict[str, int] = {}
    for p in subject.parameters:
        if not is_persistent(subject, p) and subject.shard_ranks(p) > 1:  # alone, the shard is the whole
            module = p.name.rpartition(".")[0]
            modules[module] = modules.get(module, 0) + p.numel
    return most_held(modules.values(), setting(subject, REUSE), setting(subject, LIVE))


def most_held(modules: Collection[int], reuse: int, live: int) -> int:
    """The bound of :func:`most_gathered` for modules of these sizes."""
    largest = max(modules, default=0)
    return min(sum(modules), max(live, reuse + largest) + largest)


def forward_order(subject: Subject) -> list[str]:
    """Names of the decoder's modules in the order in which a forward pass enters them; the root is empty."""
    layers = [name for layer in range(subject.config.model.num_layers) for name in _Layer(subject, layer).forward]
    return ["", "embedding", *layers, "final_norm", "head"]


def backward_order(subject: Subject) -> list[str]:
    """The same for the backward pass. A module is entered once for each of its outputs that carries a gradient.

    With activation checkpointing each layer is run forward again on the way.
    """
    order = ["", "head", "final_norm"]
    for number in reversed(range(subject.config.model.num_layers)):
        layer = _Layer(subject, number)
        order += [layer.name] * layer.outputs + [layer.block] * layer.outputs
        if subject.config.model.activation_checkpointing:
            order += layer.forward
        order += [*reversed(layer.in_block), layer.ffn_norm, layer.attention]
        order += [*reversed(layer.in_attention), layer.attention_norm]
    return [*order, "embedding"]


class _Layer:
    """Names of one layer's modules."""

    def __init__(self, subject: Subject, number: int):
        model, moe = subject.config.model, subject.config.moe
        self.name = f"layers.{number}"
        self.attention_norm, self.ffn_norm = f"{self.name}.attention_norm", f"{self.name}.ffn_norm"
        self.attention = f"{self.name}.attention"
        gate = ["gate"] if model.attention_gate != "none" else []
        norms = [] if model.qk_norm == "none" else ["q_norm", "k_norm"]
        self.in_attention = [f"{self.attention}.{name}" for name in ("qkv", *norms, *gate, "out")]
        self.block, inside = f"{self.name}.ffn", ["gate_up", "down"]
        self.outputs = 1
        if is_sparse(moe, number):
            self.block = f"{self.name}.moe"
            # Beside the hidden states the z-loss, and the balancing loss of routers that need one.
            self.outputs += {"hash": 0, "expert_choice": 1}.get(moe.router, 2)
            inside = [] if moe.router == "hash" else ["router"]
            inside += ["noise"] if moe.router == "noisy" else []
            dense = ["dense"] if moe.residual or moe.shared_intermediate_size else []
            inside += [*dense, "experts"] if subject.ep_size > 1 else ["experts", *dense]  # dense: during the exchange
            inside += ["mix"] if moe.residual else []
        self.in_block = [f"{self.block}.{name}" for name in inside]

    @property
    def forward(self) -> list[str]:
        """In the order of a forward pass."""
        attention = [self.attention_norm, self.attention, *self.in_attention]
        return [self.name, *attention, self.ffn_norm, self.block, *self.in_block]


def follow(subject: Subject) -> Gathering:
    """Gathers of one micro-batch in a run that has gone through some: the first ones still record the order."""
    owned: dict[str, list[Parameter]] = {}
    for parameter in subject.parameters:
        if not is_persistent(subject, parameter):
            owned.setdefault(parameter.name.rpartition(".")[0], []).append(parameter)
    if "embedding" in owned and subject.config.model.tie_embeddings:
        owned["head"] = owned["embedding"]  # the head shares the weight
    forward, backward = forward_order(subject), backward_order(subject)
    order = [owned.get(name, []) for name in forward + backward]
    copied = {p.name for p in subject.parameters if subject.shard_ranks(p) > 1}
    limits = (setting(subject, PREFETCH), setting(subject, REUSE), setting(subject, LIVE))
    return _follow(order, len(forward), copied, *limits)


def _follow(
    order: list[list[Parameter]], last_forward: int, copied: set[str], prefetch: int, reuse: int, live: int
) -> Gathering:
    queue = deque((parameter, step) for step, module in enumerate(order) for parameter in module)
    counted_on: dict[str, int] = {}
    held: dict[str, int] = {}
    gathered: tuple[list[Parameter], list[Parameter]] = ([], [])
    calls = [0, 0]
    peak = 0
    sizes = [sum(p.numel for p in module) for module in order]
    for step, module in enumerate(order):
        into = gathered[step >= last_forward]
        before = len(into)
        for parameter in module:
            if parameter.name not in held:
                held[parameter.name] = parameter.numel
                into.append(parameter)
        calls[step >= last_forward] += len(into) > before
        peak = max(peak, sum(numel for name, numel in held.items() if name in copied))
        wanted = {p.name for p in module if counted_on.get(p.name, -1) < step}
        popped: set[str] = set()
        while queue and len(popped) < len(wanted):
            parameter, used_at = queue.popleft()
            counted_on[parameter.name] = used_at
            popped.add(parameter.name)
        room, ahead = min(live - sum(held.values()), prefetch), 0
        while queue and ahead < room:
            parameter, used_at = queue.popleft()
            counted_on[parameter.name] = max(counted_on.get(parameter.name, -1), used_at)
            if parameter.name not in held:
                held[parameter.name] = parameter.numel
                ahead += parameter.numel
                into.append(parameter)
        calls[step >= last_forward] += ahead > 0
        peak = max(peak, sum(numel for name, numel in held.items() if name in copied))
        leaving = {p.name for p in module if counted_on.get(p.name, -1) <= step + 1}
        passed, later = 0, step + 1
        while leaving and later < len(order) and passed < reuse:
            leaving -= {p.name for p in order[later]}
            passed += sizes[later]
            later += 1
        for name in leaving:
            held.pop(name, None)
    return Gathering(tuple(gathered[0]), tuple(gathered[1]), calls[0], calls[1], peak)
