"""A plan as tables for a reader."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from moe_scale.planner.plan import Plan, gib
from moe_scale.planner.traffic import on_links

BOUNDS = {
    "compute": "matrix products",
    "memory": "the device's memory bandwidth",
    "intra": "links inside a node",
    "inter": "links between nodes",
    "host": "the host's memory and link",
    "measured": "compute, at measured rates",
}


def show(plan: Plan, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(width=110, highlight=False)
    subject, record = plan.subject, plan.record()
    layout, cluster = record["layout"], subject.cluster
    console.print(
        f"{subject.recipe} on {cluster.nodes} x {cluster.devices_per_node} {cluster.name}: ZeRO-{layout['zero_stage']}, "
        f"{layout['precision']}, ep_size {layout['ep_size']}, {layout['micro_batch']} x {layout['seq_len']} tokens a "
        f"micro-batch, {layout['grad_accum']} of them, {layout['tokens_per_step']:,} tokens a step"
    )
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
    return [
        f"memory: {gib(plan.device_bytes)} of {gib(cluster.device_memory)} a device; {verdict}",
        f"speed: {plan.step_s:.3f} s a step, {plan.tokens_per_s:,.0f} tokens/s, MFU {plan.mfu:.1%}, bound by "
        f"{BOUNDS[plan.bound]}; rates {plan.rates.source}",
        f"budget: {budget['tokens']:,.0f} tokens in {budget['days']:,.2f} days, {budget['device_hours']:,.0f} "
        f"device-hours{cost}",
        f"checkpoint: {gib(plan.checkpoint_bytes)}, {plan.checkpoint_s:,.1f} s at "
        f"{plan.wishes.disk_rate / 1e9:g} GB/s a rank",
    ]


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
        table.add_row(name.replace("_", " "), gib(size), f"{size / total:.1%}" if total else "")
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
