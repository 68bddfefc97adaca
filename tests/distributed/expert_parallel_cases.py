"""One rank that holds the expert-parallel layer against the one-process layer: ``expert_parallel_cases.py``.

Every rank builds the whole layer and makes the tokens of all ranks, so that it knows what the others must get. All
cases share one start, because importing torch and DeepSpeed costs more than all of them together.

Shapes: B batch, S sequence, D model width, E experts, L local experts.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_scale.config import MoEConfig
from moe_scale.initialization import Init
from moe_scale.moe import exchange
from moe_scale.moe import layer as layers
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel import zero
from moe_scale.parallel.collectives import mean_over_ranks, sum_over_ranks
from moe_scale.parallel.groups import ParallelGroups

D_MODEL, NUM_EXPERTS = 6, 8
TOLERANCE = 1e-10
ROUTERS = ("softmax", "noisy", "sigmoid", "expert_choice", "hash")

Gradients = dict[str, Tensor]
Forward = Callable[[MoELayer, "Tokens"], tuple[Tensor, Any]]


@dataclass
class Tokens:
    """One rank's micro-batch."""

    x_BSD: Tensor
    ids_BS: Tensor
    valid_BS: Tensor | None
    seed: int
    """Of the noise that the router draws."""


@dataclass(frozen=True)
class Case:
    """A layer, and the tokens of each rank."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    shape: Callable[[int], tuple[int, int]] = lambda rank: (2, 5)
    """(B, S) of a rank."""
    valid: Callable[[int, int, int], Tensor] | None = None
    """(rank, B, S) to a mask."""
    to: Callable[[int, int], int] | None = None
    """(rank, ranks) to the first of two neighbouring experts that all tokens of the rank choose."""
    training: bool = True

    def config(self, ep_size: int) -> MoEConfig:
        chosen = {"num_experts": NUM_EXPERTS, "top_k": 2, "intermediate_size": 3, "min_capacity": 1} | self.settings
        if chosen.get("router") == "expert_choice":
            chosen["dispatch"] = "capacity"
        return MoEConfig(**chosen, ep_size=ep_size)

    def tokens(self, rank: int, world_size: int) -> Tokens:
        generator = torch.Generator().manual_seed(100 + rank)
        batch, seq_len = self.shape(rank)
        x_BSD = torch.randn(batch, seq_len, D_MODEL, generator=generator, dtype=torch.float64)
        ids_BS = torch.randint(50_257, (batch, seq_len), generator=generator)
        if self.to is not None:  # between the two experts, on the circle where make_layer puts them
            x_BSD[..., :2] = on_circle(self.to(rank, world_size) + 0.45)
        valid_BS = None if self.valid is None else self.valid(rank, batch, seq_len)
        return Tokens(x_BSD.requires_grad_(), ids_BS, valid_BS, 7 + rank)


CASES = [
    *(Case(f"router {router}", {"router": router}) for router in ROUTERS),
    *(
        Case(f"router {router}, unequal tokens and padding", {"router": router, "expert_bias": True},
             shape=lambda rank: (1 + rank % 2, 3 + 4 * rank),
             valid=lambda rank, b, s: torch.arange(s).expand(b, s) < s - rank)
        for router in ROUTERS
    ),
    *(
        Case(f"router {router}, a rank without a sequence", {"router": router, "residual": True, "expert_bias": True},
             shape=lambda rank: (0 if rank == 1 else 2, 4))
        for router in ROUTERS
    ),
    *(
        Case(f"scope {scope}, a rank of {shape[0]} sequences of {shape[1]} tokens",
             {"aux_loss_scope": scope, "shared_intermediate_size": 4},
             shape=lambda rank, shape=shape: shape if rank == 0 else (2, 4))
        for scope in ("micro_batch", "sequence") for shape in ((0, 4), (2, 0))
    ),
    Case("no rank has a token", {"expert_bias": True}, shape=lambda rank: (0, 4)),
    Case("a rank of padding alone", {"aux_loss_scope": "sequence"},
         valid=lambda rank, b, s: torch.full((b, s), rank != 1)),
    *(
        Case(f"disjoint experts, {where} ranks", {"activation": "relu"},
             to=lambda rank, ranks, shift=shift: (rank + shift) % ranks * (NUM_EXPERTS // ranks))
        for where, shift in (("on their own", 0), ("on other", 1))
    ),
    Case("all ranks to the same experts", to=lambda rank, ranks: 2),
    *(
        Case(f"capacity by {policy}", {"dispatch": "capacity", "capacity_factor": 0.5, "drop_policy": policy},
             shape=lambda rank: (2, 6 + rank))
        for policy in ("position", "probability")
    ),
    *(
        Case(f"{half}, {activation}", {half: value, "activation": activation, "expert_bias": True})
        for half, value in (("shared_intermediate_size", 7), ("residual", True))
        for activation in ("swiglu", "gelu")
    ),
    Case("evaluation", {"router": "noisy", "shared_intermediate_size": 5}, training=False),
    *(
        Case(f"deepspeed's conventions, top-{top_k}",
             {"conventions": "deepspeed", "top_k": top_k, "dispatch": "capacity", "capacity_factor": 0.4,
              "drop_policy": "position" if top_k < 3 else "probability"},
             shape=lambda rank: (2, 6 + rank), valid=lambda rank, b, s: torch.arange(s).expand(b, s) < s - rank)
        for top_k in (1, 2, 3)
    ),
]  # fmt: skip


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    router = draw(st.sampled_from(ROUTERS))
    num_experts = draw(st.sampled_from([4, 8, 12]))
    changes = {
        "router": router,
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 5)),
        "activation": draw(st.sampled_from(["swiglu", "gelu", "relu"])),
        "expert_bias": draw(st.booleans()),
        "dispatch": draw(st.sampled_from(["dropless", "capacity"])),
        "capacity_factor": draw(st.sampled_from([0.1, 0.5, 1.0, 2.0])),
        "drop_policy": draw(st.sampled_from(["position", "probability"])),
        "aux_loss_scope": draw(st.sampled_from(["micro_batch", "sequence"])),
        **draw(st.sampled_from([{}, {"residual": True}, {"shared_intermediate_size": 3}])),
    }
    if router in ("softmax", "sigmoid"):
        changes["renormalize"] = draw(st.booleans())
    shapes = [(draw(st.integers(0, 3)), draw(st.integers(1, 7))) for _ in range(4)]
    real = [draw(st.sampled_from([1.0, 1.0, 0.5, 0.0])) for _ in range(4)]

    def valid(rank: int, batch: int, seq_len: int) -> Tensor:
        return torch.rand(batch, seq_len, generator=torch.Generator().manual_seed(rank)) < real[rank]

    training = draw(st.booleans())
    return Case(f"drawn: {changes}, shapes {shapes}, real {real}", changes, shapes.__getitem__, valid, None, training)


def draw_cases(number: int) -> list[Case]:
    """The same on every rank. Drawn beforehand: a rank that shrinks a failure would leave the others waiting."""
    found: list[Case] = []

    @settings(max_examples=number, derandomize=True, database=None, phases=[Phase.generate])
    @given(drawn_cases())
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def on_circle(expert: float) -> Tensor:
    angle = 2 * math.pi * expert / NUM_EXPERTS
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def make_layer(config: MoEConfig, groups: ParallelGroups, *, steered: bool) -> MoELayer:
    """A layer in fp64 in which nothing that starts at zero is zero, with the same values on every rank.

    ``steered`` lays the experts out on a circle in the tokens' first two features.
    """
    layer = MoELayer(config, D_MODEL, groups, Init(0)).double()
    local = groups.local_experts(config.num_experts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
            if tensor.any():
                continue
            if name.startswith("experts."):
                whole = torch.randn(config.num_experts, *tensor.shape[1:], generator=generator, dtype=tensor.dtype)
                tensor.copy_(whole[local.start : local.stop])
            else:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        if steered:
            for expert in range(NUM_EXPERTS):
                layer.router.weight[expert, :2] = 40 * on_circle(expert)
    return layer


def run_layer(layer: MoELayer, tokens: Tokens) -> tuple[Tensor, Any]:
    torch.manual_seed(tokens.seed)
    return layer(tokens.x_BSD, tokens.valid_BS, tokens.ids_BS)


def total(y_BSD: Tensor, stats: Any, seed: int) -> Tensor:
    """A random projection of the output, which tells positions and features apart, plus both losses."""
    generator = torch.Generator().manual_seed(seed)
    return (y_BSD * torch.randn(y_BSD.shape, generator=generator, dtype=y_BSD.dtype)).sum() + sum(stats[:2])


def summed_gradients(layer: nn.Module, groups: ParallelGroups) -> Gradients:
    """Experts' gradients summed over the ranks that hold the same ones, all others over all ranks."""
    found = {}
    for name, parameter in layer.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        shared = "experts." in name and groups.ep_size > 1
        dist.all_reduce(gradient, group=groups.expert_data if shared else None)
        found[name] = gradient
    return found


def local_part(name: str, gradient: Tensor, groups: ParallelGroups) -> Tensor:
    local = groups.local_experts(len(gradient))
    return gradient[local.start : local.stop] if "experts." in name else gradient


class Differences:
    """Largest difference of each thing compared; compares nothing that has another shape."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.compared = 0

    def compare(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        self.compared += 1
        if ours.shape != theirs.shape:
            self.wrong.append(f"{what}: {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
        elif ours.numel() and not (ours - theirs).abs().max() <= TOLERANCE * (1 + theirs.abs().max()):
            self.wrong.append(f"{what}: off by {float((ours - theirs).abs().max()):.3e}")

    def true(self, what: str, holds: bool) -> None:
        self.compared += 1
        if not holds:
            self.wrong.append(what)


def check(case: Case, groups: ParallelGroups, forward: Forward, into: Differences) -> None:
    """The layer on this rank's tokens, and all gradients, against one process that does every rank's tokens."""
    name, world_size, rank = f"{case.name}, ep_size {groups.ep_size}", groups.world_size, groups.rank
    config = case.config(groups.ep_size)
    steered = case.to is not None
    ours = make_layer(config, groups, steered=steered).train(case.training)
    theirs = make_layer(case.config(1), ParallelGroups(), steered=steered).train(case.training)
    for part, weight in ours.named_parameters():
        whole = dict(theirs.named_parameters())[part]
        into.true(f"{name}: initial {part}", torch.equal(weight, local_part(part, whole, groups)))

    everyones = [case.tokens(r, world_size) for r in range(world_size)]
    expected = [forward(theirs, tokens) for tokens in everyones]
    sum(total(y, stats, r) for r, (y, stats) in enumerate(expected)).backward()
    if steered:
        choices = set(expected[rank][1].assignments_E.nonzero().flatten().tolist())
        into.true(f"{name}: {choices} must be two experts", len(choices) == 2)

    mine = case.tokens(rank, world_size)
    y_BSD, stats = forward(ours, mine)
    total(y_BSD, stats, rank).backward()
    into.compare(f"{name}: output", y_BSD, expected[rank][0])
    for part, a, b in zip(stats._fields, stats, expected[rank][1], strict=True):
        into.compare(f"{name}: {part}", a, b)
    into.compare(f"{name}: gradient of x", mine.x_BSD.grad, everyones[rank].x_BSD.grad)
    found = summed_gradients(ours, groups)
    for part, parameter in theirs.named_parameters():
        whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        into.compare(f"{name}: gradient of {part}", found[part], local_part(part, whole, groups))


def check_joined(router: str, groups: ParallelGroups, into: Differences) -> None:
    """Without a capacity or noise, the ranks together are one process with one batch of all their tokens."""
    case = Case("joined", {"router": router, "shared_intermediate_size": 3}, shape=lambda rank: (1, 4 + 3 * rank))
    name = f"joined batch, router {router}, ep_size {groups.ep_size}"
    everyones = [case.tokens(r, groups.world_size) for r in range(groups.world_size)]
    joined = Tokens(
        torch.cat([t.x_BSD for t in everyones], dim=1).detach().requires_grad_(),
        torch.cat([t.ids_BS for t in everyones], dim=1), None, 0,
    )  # fmt: skip
    theirs = make_layer(case.config(1), ParallelGroups(), steered=False).eval()
    ours = make_layer(case.config(groups.ep_size), groups, steered=False).eval()
    mine = everyones[groups.rank]
    y_BSD, whole_BSD = run_layer(ours, mine)[0], run_layer(theirs, joined)[0]
    y_BSD.square().sum().backward()
    whole_BSD.square().sum().backward()
    start = sum(t.x_BSD.shape[1] for t in everyones[: groups.rank])
    here = slice(start, start + mine.x_BSD.shape[1])
    into.compare(f"{name}: output", y_BSD, whole_BSD[:, here])
    into.compare(f"{name}: gradient of x", mine.x_BSD.grad, joined.x_BSD.grad[:, here])
    found = summed_gradients(ours, groups)
    for part, parameter in theirs.named_parameters():
        whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        into.compare(f"{name}: gradient of {part}", found[part], local_part(part, whole, groups))


def check_global_scope(router: str, groups: ParallelGroups, into: Differences) -> None:
    """The ranks' global losses, averaged, are the one-process loss of the joined batch; so are their gradients.

    The tokens are skewed otherwise on each rank, so that the mean of the micro-batches' own losses is another number.
    """
    name = f"global scope, router {router}, ep_size {groups.ep_size}"
    case = Case("global", {"router": router, "aux_loss_scope": "global"})
    local = Case("local", {"router": router, "aux_loss_scope": "micro_batch"})
    everyones = [case.tokens(r, groups.world_size) for r in range(groups.world_size)]
    for r, tokens in enumerate(everyones):
        tokens.x_BSD = (tokens.x_BSD.detach() + 2 * r).requires_grad_()
    joined = Tokens(
        torch.cat([t.x_BSD for t in everyones]).detach().requires_grad_(),
        torch.cat([t.ids_BS for t in everyones]), None, 0,
    )  # fmt: skip
    theirs = make_layer(local.config(1), ParallelGroups(), steered=False).eval()
    ours = make_layer(case.config(groups.ep_size), groups, steered=False).eval()
    mine = everyones[groups.rank]
    loss, whole = run_layer(ours, mine)[1].aux_loss, run_layer(theirs, joined)[1].aux_loss
    into.compare(f"{name}: loss", mean_over_ranks(loss.detach()), whole.detach())
    own = run_layer(theirs, mine)[1].aux_loss.detach()
    gap = (mean_over_ranks(own) - whole).abs().item()
    into.true(f"{name}: the micro-batches' own losses must differ, by more than {gap}", gap > 1e-3)
    loss.backward()
    whole.backward()
    rows = slice(2 * groups.rank, 2 * groups.rank + 2)
    into.compare(f"{name}: gradient of x", mine.x_BSD.grad / groups.world_size, joined.x_BSD.grad[rows])
    into.compare(f"{name}: gradient of the router", mean_over_ranks(ours.router.weight.grad), theirs.router.weight.grad)


def twice_accumulated(layer: MoELayer, tokens: Tokens) -> tuple[Tensor, Any]:
    """A backward pass before the one that is looked at: both gradients add up."""
    y_BSD, stats = run_layer(layer, tokens)
    total(y_BSD, stats, 55).backward()
    return run_layer(layer, tokens)


def applied_twice(layer: MoELayer, tokens: Tokens) -> tuple[Tensor, Any]:
    """Two layers in a row, so that several exchanges are in one graph."""
    y_BSD, _ = run_layer(layer, tokens)
    inner = Tokens(tokens.x_BSD + y_BSD, tokens.ids_BS, tokens.valid_BS, tokens.seed)
    return run_layer(layer, inner)


def recomputed(layer: MoELayer, tokens: Tokens) -> tuple[Tensor, Any]:
    """Two layers in a row with activation checkpointing: the exchanges run again in the backward pass."""

    def step(x_BSD: Tensor) -> tuple[Tensor, Any]:
        return layer(x_BSD, tokens.valid_BS, tokens.ids_BS)

    torch.manual_seed(tokens.seed)
    y_BSD, _ = checkpoint(step, tokens.x_BSD, use_reentrant=False)
    return checkpoint(step, tokens.x_BSD + y_BSD, use_reentrant=False)


def check_overlap(groups: ParallelGroups, into: Differences) -> None:
    """The dense half runs between the start and the end of the exchange, in both directions."""
    case = Case("overlap", {"shared_intermediate_size": 4})
    layer = make_layer(case.config(groups.ep_size), groups, steered=False)
    events: list[str] = []

    def recording(event: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            events.append(event)
            return inner(*args)

        return wrapped

    originals = {(half, way): getattr(half, way) for half in (exchange._Start, exchange._Finish)
                 for way in ("forward", "backward")}  # fmt: skip
    for (half, way), inner in originals.items():
        setattr(half, way, staticmethod(recording(f"{half.__name__} {way}", inner)))
    layer.dense.register_forward_hook(lambda *_: events.append("dense forward"))
    layer.dense.register_full_backward_hook(lambda *_: events.append("dense backward"))
    try:
        y_BSD, stats = run_layer(layer, case.tokens(groups.rank, groups.world_size))
        total(y_BSD, stats, 0).backward()
    finally:
        for (half, way), inner in originals.items():
            setattr(half, way, staticmethod(inner))
    expected = ["_Start forward", "dense forward", "_Finish forward"]
    expected += ["_Finish backward", "dense backward", "_Start backward"]
    into.true(f"order of the exchange: {events}", events == expected)


def check_what_is_held(groups: ParallelGroups, into: Differences) -> None:
    """Without gradients, rows are in memory for the steps that read them alone: those that arrived, those computed.

    Those that are sent are left out: gloo's threads may hold them for as long as nothing else is sent.
    """
    case = Case("held rows")
    layer = make_layer(case.config(groups.ep_size), groups, steered=False)
    rows: dict[str, weakref.ref[Tensor]] = {}
    alive: dict[str, list[str]] = {}

    def noting(step: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            given = args[0]
            alive[step] = [name for name, ref in rows.items() if ref() is not None and ref() is not given]
            result = inner(*args)
            rows[step] = weakref.ref(result[0] if isinstance(result, tuple) else result)
            return result

        return wrapped

    steps = {
        "to_experts": (exchange, "to_experts"),
        "experts": (layer.experts, "forward"),
        "from_experts": (exchange, "from_experts"),
        "combine": (layers, "combine_rows"),
    }
    originals = {step: getattr(*place) for step, place in steps.items()}
    for step, (owner, name) in steps.items():
        setattr(owner, name, noting(step, originals[step]))
    try:
        with torch.no_grad():
            run_layer(layer, case.tokens(groups.rank, groups.world_size))
    finally:
        for step, (owner, name) in steps.items():
            setattr(owner, name, originals[step])
    into.true(f"rows held that nobody reads: {alive}", alive == {step: [] for step in steps})


def checks(groups: ParallelGroups, into: Differences) -> Iterator[None]:
    for case in CASES + draw_cases(40):
        yield check(case, groups, run_layer, into)
    for forward in (twice_accumulated, applied_twice, recomputed):
        for router in ROUTERS:
            changes = {"router": router, "shared_intermediate_size": 4, "router_jitter": 0.1}
            yield check(Case(f"{forward.__name__}, router {router}", changes), groups, forward, into)
    for router in ("softmax", "sigmoid", "hash"):
        yield check_joined(router, groups, into)
    for router in ("softmax", "sigmoid"):
        yield check_global_scope(router, groups, into)
    if groups.ep_size > 1:
        yield check_overlap(groups, into)
        yield check_what_is_held(groups, into)


def main() -> None:
    zero.init_distributed(timeout_minutes=1)
    torch.set_num_threads(1)
    world_size = dist.get_world_size()
    into = Differences()
    for ep_size in {2: (1, 2), 4: (2, 4)}[world_size]:  # alone, four ranks do what two do
        groups = zero.make_groups(ep_size)
        for _ in checks(groups, into):
            pass
    failed = sum_over_ranks(torch.tensor(len(into.wrong)))
    for text in into.wrong[:40]:
        print(text, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)
    print(f"compared {into.compared}")


if __name__ == "__main__":
    main()
