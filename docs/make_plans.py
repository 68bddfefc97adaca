"""Writes docs/plans.md: what the commands in it print. Run from the repository's root: python docs/make_plans.py"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

from moe_scale.cli import main

STATES = "moe-scale plan recipes/multimodal.py"
PLAN = "moe-scale plan recipes/lm_16l.py"
DENSE = "--moe.enabled false --moe.top_k 1 --model.attention_gate none"
SECTIONS = {
    "About 1B parameters, one node of H100": {
        "Mixture: 0.9B, of which a token uses 0.17B": f"{PLAN} --cluster H100 --tokens 26e9 --search "
        "--moe.num_experts 32",
        "Dense: 1.3B": f"{PLAN} --cluster H100 --tokens 26e9 --search {DENSE} --model.num_layers 24 "
        "--model.d_model 2048 --model.num_heads 16 --model.num_kv_heads 16 --moe.intermediate_size 5504",
    },
    "About 13B parameters, four nodes of H100": {
        "Mixture: 13.5B, of which a token uses 1.4B": f"{PLAN} --cluster H100 --nodes 4 --tokens 260e9 --search "
        "--model.num_layers 32 --model.d_model 2048 --model.num_heads 16 --model.num_kv_heads 8 --moe.num_experts 64 "
        "--moe.top_k 4 --moe.intermediate_size 1024",
        "Dense: 12.9B": f"{PLAN} --cluster H100 --nodes 4 --tokens 260e9 --search {DENSE} --model.num_layers 40 "
        "--model.d_model 5120 --model.num_heads 40 --model.num_kv_heads 40 --moe.intermediate_size 13824",
    },
    "About 1T parameters, 1,024 H100": {
        "Mixture: 1.05T, of which a token uses 36B": f"{PLAN} --cluster H100 --nodes 128 --tokens 20e12 --search "
        "--model.num_layers 61 --model.d_model 7168 --model.num_heads 64 --model.num_kv_heads 8 --model.head_dim 128 "
        "--moe.num_experts 384 --moe.top_k 8 --moe.intermediate_size 2048 --moe.shared_intermediate_size 2048",
        "Dense: 1.01T": f"{PLAN} --cluster H100 --nodes 128 --tokens 20e12 --search {DENSE} --model.num_layers 128 "
        "--model.d_model 25600 --model.num_heads 160 --model.num_kv_heads 160 --moe.intermediate_size 68352",
    },
    "16,384 ranks": {
        "The mixture of 1T parameters under an uneven load, with slow ranks": f"{PLAN} --cluster H100 --simulate 16384 "
        "--zipf 0.3 --straggler_spread 0.02 --moe.ep_size 16 --model.activation_checkpointing true "
        "--model.num_layers 61 --model.d_model 7168 --model.num_heads 64 --model.num_kv_heads 8 --model.head_dim 128 "
        "--moe.num_experts 384 --moe.top_k 8 --moe.intermediate_size 2048 --moe.shared_intermediate_size 2048",
    },
    "Texts and images: what holds 1.3B and 13B parameters": {
        "`multimodal` at scale `1node`: 1.3B, of which a token uses 0.6B": f"{STATES} --scale 1node --cluster H100",
        "`multimodal` at scale `multinode`: 12.9B, of which a token uses 1.6B": f"{STATES} --scale multinode "
        "--cluster H100 --nodes 2",
    },
}
"""Commands by heading and title."""
CONCLUDING = ("ZeRO-", "parameters:", "compute:", "memory:", "speed:", "budget:", "checkpoint:", "deepspeed ")
"""How the printed lines begin that conclude a plan."""
COMPARED = {"ZeRO-1": (1, False), "ZeRO-3": (3, False), "ZeRO-3, offloaded": (3, True)}
"""Of the ways to spread model states those in the short table: stage, and whether the optimizer is on the host."""


def output_of(command: str) -> str:
    """What ``moe-scale`` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(shlex.split(command)[1:])
    return printed.getvalue().rstrip()


def record_of(command: str) -> dict[str, Any]:
    """The ``plan.json`` of a command."""
    with tempfile.TemporaryDirectory() as folder:
        output_of(f"{command} --output_dir {folder}")
        return json.loads((Path(folder) / "plan.json").read_text())


def figures(printed: str) -> list[str]:
    """The lines that conclude a plan, put together where the printed ones are broken."""
    found: list[str] = []
    for line in printed.splitlines():
        if line.startswith(CONCLUDING):
            found.append(line)
        elif found and line[:1].islower() and ": " not in line:
            found[-1] += f" {line}"
    return [f"`{line}`" if line.startswith("deepspeed ") else line for line in found]


def wrapped(command: str) -> str:
    """A command in lines of at most 100 characters, each continued."""
    lines = [""]
    for word in command.split(" --"):
        flag = f" --{word}" if lines != [""] else word
        if len(lines[-1] + flag) > 100:
            lines.append("   " + flag)
        else:
            lines[-1] += flag
    return " \\\n".join(lines)


def machines(record: dict[str, Any]) -> str:
    """A table of the fewest devices of each kind that hold a model, and what each has left."""
    lines = ["| the fewest devices |" + "".join(f" {name} |" for name in COMPARED), "|---|" + "---|" * len(COMPARED)]
    for kind, found in record["machines"].items():
        ways = {(way["stage"], way["offload"]): way for way in found}
        lines.append(f"| {kind} |" + "".join(f" {_held(ways[key])} |" for key in COMPARED.values()))
    return "\n".join(lines)


def _held(way: dict[str, Any]) -> str:
    if way["devices"] is None:
        return "none"
    nodes = f" ({way['nodes']} nodes)" if way["nodes"] > 1 else ""
    return f"{way['devices']}{nodes}, {way['left_for_activations'] / 2**30:.1f} GiB left"


def write() -> None:
    """Run every command and write the page."""
    page = Path(__file__).with_name("plans.md")
    head = page.read_text().split("<!-- plans -->")[0]
    parts = [head + "<!-- plans -->"]
    for heading, commands in SECTIONS.items():
        parts.append(f"## {heading}")
        for title, command in commands.items():
            printed = output_of(command)
            concluding = "\n".join(f"- {line}" for line in figures(printed))
            parts.append(f"**{title}**\n\n```bash\n{wrapped(command)}\n```\n\n{concluding}")
            parts += [machines(record_of(command))] if command.startswith(STATES) else []
            parts.append(f"<details><summary>all that it prints</summary>\n\n```text\n{printed}\n```\n\n</details>")
    page.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    write()
