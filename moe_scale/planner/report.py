"""A plan as tables for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from moe_scale.planner.plan import Plan, gib
from moe_scale.planner.search import Outcome, reasons
from moe_scale.planner.simulate import Simulation, group_members
from moe_scale.planner.states import Held, StatesPlan
from moe_scale.planner.traffic import on_links
from moe_scale.telemetry.terminal import Console

BOUNDS = {
    "compute": "matrix products",
    "memory": "the device's memory bandwidth",
    "intra": "links inside a node",
    "inter": "links between nodes",
    "host": "the host's memory and link",
    "measured": "compute, at measured rates",
}


NAMES = {
    "whole": "small parameters, whole",
    "master": "fp32 weights",
    "gradients_in_passes": "gradients",
    "gradients_at_update": "gradients",
    "host_gradients": "fp32 gradients and staging",
    "staging": "staging of gradients",
    "bucket": "bucket of gradients",
    "update": "temporaries of the update",
}
"""What a plan's short names stand for in a table."""


def show(plan: Plan, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(width=110, highlight=False)
    subject, record = plan.subject, plan.record()
    layout, cluster = record["layout"], subject.cluster
    micro_batches = "1 micro-batch" if layout["grad_accum"] == 1 else f"{layout['grad_accum']} micro-batches"
    tokens = f"{micro_batches} of {layout['micro_batch']} x {layout['seq_len']} tokens a rank"
    console.print(f"{subject.recipe} on {cluster.nodes} x {cluster.devices_per_node} {cluster.name}")
    console.print(f"ZeRO-{layout['zero_stage']}, {layout['precision']}, ep_size {layout['ep_size']}, {tokens}")
    console.print(_parameters(record["parameters"]))
    console.print(_bytes("bytes of a rank at its peak", plan.device_memory, plan.device_bytes))
    if host := plan.states.on(host=True):
        console.print(_bytes("bytes of a rank in host memory", host, plan.host_bytes))
    console.print(_bytes("activations kept", plan.activations.saved, sum(plan.activations.saved.values())))
    if plan.flows:
        console.print(_traffic(plan))
    console.print(_time(plan))
    for line in conclusions(plan):
        console.print(line)


def conclusions(plan: Plan) -> list[str]:
    """The figures that a plan is made for, one line each."""
    budget, cluster = plan.record()["budget"], plan.subject.cluster
    cost = "" if budget["cost"] is None else f", cost {budget['cost']:,.0f}"
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT: " + "; ".join(plan.problems)
    flops = plan.flops_per_token
    return [
        f"compute: {flops:.4g} FLOPs a token in training; logits and loss take {gib(plan.activations.head)}",
        f"memory: {gib(plan.device_bytes)} of {gib(cluster.device_memory)} a device; {verdict}",
        f"speed: {plan.step_s:.3f} s a step, {plan.tokens_per_s:,.0f} tokens/s, MFU {percent(plan.mfu)}, bound by "
        f"{BOUNDS[plan.bound]}; rates {plan.rates.source}",
        f"budget: {budget['tokens']:,.0f} tokens in {budget['days']:,.2f} days, {budget['device_hours']:,.0f} "
        f"device-hours{cost}",
        f"checkpoint: {gib(plan.checkpoint_bytes)}, {plan.checkpoint_s:,.1f} s at "
        f"{plan.wishes.disk_rate / 1e9:g} GB/s a rank",
    ]


def show_states(plan: StatesPlan, console: Console | None = None) -> None:
    """Print what ranks hold of a model whose activations are not known."""
    console = console or Console(width=110, highlight=False)
    subject, own, record = plan.subject, plan.own.held, plan.record()
    cluster, layout = subject.cluster, record["layout"]
    micro_batches = "1 micro-batch" if layout["grad_accum"] == 1 else f"{layout['grad_accum']} micro-batches"
    console.print(f"{subject.recipe} on {cluster.nodes} x {cluster.devices_per_node} {cluster.name}")
    console.print(f"{plan.own.sharding}, {layout['precision']}, {layout['optimizer']}, {micro_batches} a step")
    console.print(_parameters(record["parameters"]))
    if own:
        sizes = {**own.states.on(host=False, moment="in passes"), "gradient buffers": own.states.passing_bucket}
        sizes["gathered parameters, at most"] = own.gathered_bytes
        sizes = {name: size for name, size in sizes.items() if size}
        title = "bytes of a rank in forward and backward pass, without activations"
        console.print(_bytes(title, sizes, own.in_passes))
    console.print(_shardings(plan))
    for outcome in plan.outcomes:
        if outcome.why:
            console.print(f"{outcome.sharding}: {outcome.why}")
    console.print("machines: the fewest devices (1, 2, 4, ...) that hold the model, and what each has left over:")
    console.print(_machines(plan))
    for line in states_conclusions(plan):
        console.print(line)


def states_conclusions(plan: StatesPlan) -> list[str]:
    """The figures that a plan of model states is made for, one line each."""
    own, cluster, total = plan.own, plan.subject.cluster, plan.record()["parameters"]
    lines = [f"parameters: {total['total']:,}, of which a token uses {total['active']:,}"]
    if held := own.held:
        most = f"memory: model states take {gib(max(held.in_passes, held.at_update))} of"
        verdict = f"IT DOES NOT FIT: {own.why}" if own.why else f"{gib(held.room)} are left for activations"
        lines.append(f"{most} {gib(cluster.device_memory)} a device; {verdict}")
    return [
        *lines,
        f"checkpoint: {gib(plan.checkpoint_bytes)}, {plan.checkpoint_s:,.1f} s at {plan.disk_rate / 1e9:g} GB/s a rank",
    ]


def _shardings(plan: StatesPlan) -> Table:
    table = Table("of a rank", "between steps", "in passes", "at update", "in host", "for activations", "")
    for outcome in plan.outcomes:
        row = [""] * 5
        if held := outcome.held:
            sizes = (held.between_steps, held.in_passes, held.at_update, held.host_bytes)
            row = [gib(size) if size else "" for size in sizes] + [gib(held.room) if held.room > 0 else "none"]
        style = "bold" if outcome.sharding == plan.own.sharding else None
        table.add_row(str(outcome.sharding), *row, "no" if outcome.why else "fits", style=style)
    return table


def _machines(plan: StatesPlan) -> Table:
    table = Table("", *plan.machines)
    for outcome in plan.outcomes:
        cells = (_fewest(found[outcome.sharding]) for found in plan.machines.values())
        table.add_row(outcome.sharding.method, *cells)
    return table


def _fewest(held: Held | None) -> str:
    return "none" if held is None else f"{held.subject.world_size}: {gib(held.room)}"


def percent(share: float | None) -> str:
    """A share as it is printed; one that is not known as a question mark."""
    return "?" if share is None else f"{share:.1%}"


def _parameters(parameters: Mapping[str, object]) -> Table:
    table = Table("parameters", "all", "a token uses")
    by_part, active = parameters["by_part"], parameters["active_by_part"]
    assert isinstance(by_part, dict)
    assert isinstance(active, dict)
    for part, count in by_part.items():
        table.add_row(part, f"{count:,}", f"{active[part]:,}")
    table.add_row("total", f"{parameters['total']:,}", f"{parameters['active']:,}", style="bold")
    return table


def _bytes(title: str, sizes: Mapping[str, float], total: float) -> Table:
    table = Table(title, "", "share")
    for name, size in sizes.items():
        table.add_row(NAMES.get(name, name), gib(size), f"{size / total:.1%}" if total else "")
    table.add_row("total", gib(total), "", style="bold")
    return table


def _traffic(plan: Plan) -> Table:
    table = Table("collective of a step, a rank", "group", "payload", "inside nodes", "between nodes")
    for flow in plan.flows:
        link = on_links(plan.subject, flow)
        name = f"{flow.collective}: {flow.purpose}"
        table.add_row(name, flow.group, gib(flow.payload), gib(link.intra), gib(link.inter))
    return table


def _time(plan: Plan) -> Table:
    table = Table("time of a step", "ms", "share", "bound by")
    for part in plan.parts:
        hidden = f", {1e3 * (part.busy - part.seconds):,.1f} ms hidden" if part.busy > part.seconds else ""
        share = f"{part.seconds / plan.step_s:.1%}"
        table.add_row(part.name, f"{1e3 * part.seconds:,.2f}", share, BOUNDS[part.bound] + hidden)
    table.add_row("step", f"{1e3 * plan.step_s:,.2f}", "", "", style="bold")
    return table


SHOWN = 10
"""Layouts of a search that are printed; ``plan.json`` has all."""


def show_search(outcomes: Sequence[Outcome], console: Console | None = None) -> None:
    """Print the fastest layouts that fit, and the reasons of those that do not."""
    console = console or Console(width=110, highlight=False)
    fitting = [outcome for outcome in outcomes if not outcome.why]
    table = Table("layout that fits", "tokens/s", "MFU", "a device", "bound by")
    for outcome in fitting[:SHOWN]:
        plan = outcome.plan
        assert plan is not None
        speed = f"{plan.tokens_per_s:,.0f}"
        table.add_row(str(outcome.layout), speed, percent(plan.mfu), gib(plan.device_bytes), BOUNDS[plan.bound])
    if fitting:
        console.print(f"{len(fitting)} of {len(outcomes)} layouts fit; the fastest:")
        console.print(table)
    failures = Table("layouts that fail", "why, as for", "")
    for kind in reasons(outcomes).values():
        failures.add_row(str(len(kind)), str(kind[0].layout), kind[0].why)
    console.print(failures)


def show_simulation(simulation: Simulation, console: Console | None = None) -> None:
    """Print what a simulation found."""
    console = console or Console(width=110, highlight=False)
    subject, params = simulation.subject, simulation.params_W
    expert, expert_data = group_members(subject.world_size, subject.ep_size)
    console.print(f"simulated: {subject.world_size:,} ranks on {subject.cluster.nodes:,} nodes")
    table = Table("", "")
    table.add_row("parameters that a rank updates", f"{params.min():,} to {params.max():,}, {params.sum():,} in all")
    table.add_row("expert groups", _members(expert))
    table.add_row("expert-data groups", _members(expert_data))
    if simulation.layers_drawn:
        table.add_row("sparse layers drawn", f"{simulation.layers_drawn}")
        table.add_row("load of the fullest expert", f"{simulation.expert_load.mean():.2f} times the mean")
        table.add_row("rows of the fullest rank", f"{simulation.rank_load.mean():.3f} times the mean")
        table.add_row("all-to-alls of tokens", f"{simulation.all_to_all_s:.3f} s a step")
    table.add_row("slowest rank", f"{simulation.slowdowns_W.max():.3f} times the fastest's time")
    table.add_row("step, even load", f"{simulation.even_s:.3f} s")
    table.add_row("step, drawn load", f"{simulation.uneven_s:.3f} s")
    table.add_row("step, drawn load and slow ranks", f"{simulation.straggling_s:.3f} s")
    console.print(table)


def _members(groups: object) -> str:
    listed = [list(map(int, row)) for row in groups]  # type: ignore[attr-defined]
    first = listed[0]
    shown = ", ".join(map(str, first[:4])) + (", ..." if len(first) > 4 else "")
    return f"{len(listed):,} of {len(first):,} ranks; the first: {shown}"
