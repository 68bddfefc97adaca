"""Whether experts made of a dense model are worth it: trained on the same tokens as the dense model, measured, drawn.

    python benchmarks/upcycling.py --output_dir runs/upcycling

A dense model is trained; then it, two upcycled ones and one that is drawn anew with experts each train on as many
tokens, the same in the same order; and the dense one once more, for as many FLOPs as the larger upcycled one. All of
that for each of several seeds, of weights and order, so that a difference can be held against what another seed
changes. Ended and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_scale.cli import main as moe_scale
from moe_scale.telemetry.quiet import quiet
from moe_scale.tools.sweep_report import read_records
from moe_scale.tools.tables import markdown
from moe_scale.train.loop import train
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE

MODEL = {
    "model.num_layers": 4,
    "model.d_model": 128,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.vocab_size": 384,
    "data.tokenizer": "bytes",
    "data.seq_len": 128,
    "eval.every": 50,
    "eval.max_tokens": 16_384,
    "eval.sample_tokens": 0,
    "eval.sink_sequences": 0,
    "optim.warmup_steps": 20,
    "telemetry.every": 5,
    "telemetry.tensorboard": "false",
    "telemetry.wandb": "off",
}
DENSE = {"moe.enabled": "false", "moe.top_k": 2, "moe.intermediate_size": 128}
UPCYCLED = {
    "8 copies, 2 a token": "--num_experts 8",
    "4 copies in halves, 2 halves a token": "--num_experts 8 --granularity 2",
}
"""What is made of the dense model, and how."""
COPIES = next(iter(UPCYCLED))
DRAWN = "drawn, 8 experts, 2 a token"
CONTINUED, LONGER = "dense", "dense, the FLOPs of the copies"


def flags(settings: dict[str, Any]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def run(folder: Path, settings: dict[str, Any], *config: str) -> None:
    """Train, or go on, or find that nothing is left to do."""
    train(prepare_job(RECIPE, [*config, *flags(settings), "--output_dir", str(folder), "--resume", "auto"]))


def figures(folder: Path) -> dict[str, Any]:
    """The first training loss, and the held-out losses by step."""
    records = read_records(folder)
    losses = [record["lm_loss"] for record in records if "lm_loss" in record]
    heldout = {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}
    flops = [record["flops"] for record in records if "flops" in record]
    return {"first_loss": losses[0], "heldout": heldout, "flops": flops[-1]}


def measure(output_dir: Path, steps: tuple[int, int], seed: int) -> dict[str, Any]:
    """Train everything from one seed. Returns the figures of each continuation, and of the dense model before it."""
    dense = output_dir / "dense"
    run(dense, MODEL | DENSE | {"max_steps": steps[0], "optim.lr": 2e-3, "seed": 2 * seed})
    on = MODEL | {"max_steps": steps[1], "optim.lr": 1e-3, "seed": 2 * seed + 1}
    experts = {"moe.num_experts": 8, "moe.top_k": 2, "moe.intermediate_size": 256}
    found = {"before": figures(dense)}
    for number, (name, made) in enumerate(UPCYCLED.items()):
        model = output_dir / f"upcycled-{number}"
        if not model.exists():
            moe_scale(["upcycle", str(dense), "--output_dir", str(model), *made.split()])
        run(output_dir / f"on-{number}", on, "--config", str(model / "settings.yaml"))
        found[name] = figures(output_dir / f"on-{number}")
    run(output_dir / "on-dense", on | DENSE | {"model.pretrained": dense})
    found[CONTINUED] = figures(output_dir / "on-dense")
    more = round(steps[1] * found[COPIES]["flops"] / found[CONTINUED]["flops"])
    run(output_dir / "on-dense-longer", on | DENSE | {"model.pretrained": dense, "max_steps": more})
    found[LONGER] = figures(output_dir / "on-dense-longer")
    run(output_dir / "on-drawn", on | experts)
    found[DRAWN] = figures(output_dir / "on-drawn")
    return found


def last_loss(found: dict[str, Any]) -> float:
    return float(list(found["heldout"].values())[-1])


def table(seeds: list[dict[str, Any]]) -> str:
    """Markdown: means over the seeds and their standard deviations, of each last loss and of its distance from that of
    the dense model of the same seed that went on."""
    rows = []
    for name in seeds[0]:
        losses = [last_loss(found[name]) for found in seeds]
        apart = [last_loss(found[name]) - last_loss(found[CONTINUED]) for found in seeds]
        first, flops = (statistics.fmean(found[name][what] for found in seeds) for what in ("first_loss", "flops"))
        of_losses = f"{statistics.fmean(losses):.4f} ± {spread(losses):.4f}"
        of_apart = f"{statistics.fmean(apart):+.4f} ± {spread(apart):.4f}" if name not in ("before", CONTINUED) else ""
        rows.append([name, f"{first:.4f}", of_losses, of_apart, f"{flops:.3g}"])
    return markdown(["", "first loss", "held-out loss", "against dense", "FLOPs"], rows)


def spread(values: list[float]) -> float:
    """The standard deviation of a sample; that of one value is not known."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def draw(seeds: list[dict[str, Any]], path: Path) -> None:
    """Held-out losses over the steps of what goes on from the dense model: the mean over the seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    before = statistics.fmean(last_loss(found["before"]) for found in seeds)
    axes.axhline(before, color="grey", linewidth=0.8, label="dense, before")
    for name in seeds[0]:
        if name in ("before", DRAWN):
            continue
        steps = [int(step) for step in seeds[0][name]["heldout"]]
        curves = list(zip(*(found[name]["heldout"].values() for found in seeds), strict=True))
        (line,) = axes.plot(steps, [statistics.fmean(values) for values in curves], label=name, marker="o")
        axes.fill_between(steps, list(map(min, curves)), list(map(max, curves)), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="steps, of the same tokens", ylabel="held-out loss, nats a byte", title="From the dense model on")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", default="runs/upcycling", help="folder of the runs and figures [%(default)s]")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(400, 300), help="of the dense model, and of what goes on [%(default)s]"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many times all is trained [%(default)s]")
    arguments = parser.parse_args()
    quiet()
    folder = Path(arguments.output_dir)
    seeds = [measure(folder / f"seed-{n}", tuple(arguments.steps), n) for n in range(arguments.seeds)]
    (folder / "upcycling.json").write_text(json.dumps(seeds, indent=1) + "\n")
    draw(seeds, folder / "upcycling.png")
    print(table(seeds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
