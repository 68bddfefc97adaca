"""Why a small Switch Transformer gets worse when it is trained for long, and what helps: trained, measured, drawn.

    python benchmarks/degradation.py --output_dir runs/degradation

Two texts are made of the installed sample. `plain` are pieces of plays; `skewed` are half of these pieces, and one
speech as often as there are pieces. On each, `recipes/switch.py` is trained far past the point where the held-out loss
turns, as it is and with one thing changed at a time, by `moe-scale sweep`, which goes on where it was when it is
started again.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_scale.config import TextDataConfig
from moe_scale.data.sources import SourceReport, read_documents
from moe_scale.tools.sweep_plan import Plan, read_plan
from moe_scale.tools.sweep_report import read_records

PIECE, SEED = 600, 0
"""Characters of a piece, about; and the seed of their choice."""
DATA = ("plain", "skewed")
VARIANTS = {
    "switch": "",
    "no balancing": "moe.aux_loss_weight=0",
    "z-loss 0.001": "moe.z_loss_weight=0.001",
    "jitter 0.01": "moe.router_jitter=0.01",
    "dropout 0.1, experts 0.4": "model.dropout=0.1 moe.expert_dropout=0.4",
    "bias balancing": "moe.router=sigmoid moe.aux_loss_weight=0",
    "hash router": "moe.router=hash",
    "capacity 1.0": "moe.capacity_factor=1.0",
    "dense": "moe.enabled=false",
    "four times the data": "data.source={more}",
}
"""What is changed, and the settings that change it."""
FIXED = {
    "model.num_layers": 2,
    "model.positions": "sinusoidal",
    "moe.every": 1,
    "moe.num_experts": 8,
    "moe.intermediate_size": 256,
    "data.seq_len": 128,
    "data.holdout_fraction": 0.5,
    "optim.lr": 3e-3,
    "optim.schedule": "constant",
    "optim.warmup_steps": 40,
    "optim.weight_decay": 0.0,
    "eval.sample_tokens": 0,
    "telemetry.every": 5,
    "telemetry.tensorboard": "false",
}
"""The settings of all runs: without anything that holds overfitting back."""
HELDOUT = {"plain": 0.5, "skewed": 0.25}
"""Shares that are held out: half of the pieces. Copies of one text are all on one side, and so many are trained on."""
BYTES_A_STEP = 8 * 128
"""Sequences of the CPU's DeepSpeed JSON, and the bytes of each."""
PANELS = {
    "lm_loss": "training loss (nats a byte)",
    "eval/loss": "held-out loss (nats a byte)",
    "router/load_max": "largest load / mean load",
    "router/dropped": "dropped share",
    "router/entropy": "router entropy / log E",
    "router/logit_rms": "router scores, root mean square",
    "weight_norm/experts": "norm of the experts' weights",
    "weight_norm/router": "norm of the router's weights",
}
LATE = ("router/load_max", "router/dropped", "router/entropy", "router/logit_rms")
"""Of the last steps, in the table."""


def main() -> None:
    """Do what the command line asks for."""
    arguments = parse()
    folder: Path = arguments.output_dir
    if not arguments.report_only:
        sizes = write_texts(folder, arguments.kilobytes)
        for data in DATA:
            train(folder, data, arguments)
        (folder / "texts.json").write_text(json.dumps(sizes, indent=1) + "\n")
    texts = json.loads((folder / "texts.json").read_text())
    results = {data: read_runs(folder / data) for data in DATA}
    origins = {data: plan_of(folder / data).origin for data in DATA}
    content = {"texts": texts, "fixed": FIXED, "variants": VARIANTS, "origin": origins, "runs": results}
    (folder / "degradation.json").write_text(json.dumps(content) + "\n")
    for data in DATA:
        draw(texts, data, results[data], folder / f"degradation_{data}.png")
        print(f"\n{data}\n\n{table(texts, data, results[data])}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/degradation"), help="[%(default)s]")
    parser.add_argument("--kilobytes", type=int, default=24, help="of pieces of plays in each text [%(default)s]")
    parser.add_argument("--max_steps", type=int, default=400, help="of 1,024 bytes, of each run [%(default)s]")
    parser.add_argument("--parallel", type=int, default=2, help="runs at once [%(default)s]")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="[all]")
    parser.add_argument("--report_only", action="store_true", help="table and pictures of what is there")
    return parser.parse_args()


# --- texts -----------------------------------------------------------------------------------------------------------


def write_texts(folder: Path, kilobytes: int) -> dict[str, dict[str, int]]:
    """Write the texts as JSON lines. Returns their pieces and bytes."""
    pieces = [piece for text in read_documents(TextDataConfig(), SourceReport()) for piece in cut(text)]
    random.Random(SEED).shuffle(pieces)
    few, many = first_bytes(pieces, 1000 * kilobytes), first_bytes(pieces, 4000 * kilobytes)
    half, double = few[: len(few) // 2], many[: len(many) // 2]
    speech, sizes = [pieces[-1]], {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in {
        "plain": few,
        "plain-more": many,
        "skewed": half + speech * len(half),
        "skewed-more": double + speech * len(double),
    }.items():
        lines = [json.dumps({"text": piece}, ensure_ascii=False) + "\n" for piece in some]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        sizes[name] = {"pieces": len(some), "bytes": sum(len(piece.encode()) for piece in some)}
    return sizes


def cut(text: str) -> Iterator[str]:
    """Pieces of whole speeches."""
    piece = ""
    for speech in text.split("\n\n"):
        piece += speech.strip() + "\n\n"
        if len(piece) >= PIECE:
            yield piece.strip()
            piece = ""


def first_bytes(pieces: list[str], count: int) -> list[str]:
    taken, total = [], 0
    for piece in pieces:
        total += len(piece.encode())
        if total > count:
            break
        taken.append(piece)
    return taken


# --- runs ------------------------------------------------------------------------------------------------------------


def train(folder: Path, data: str, arguments: argparse.Namespace) -> None:
    """Train all variants on a text."""
    base = {"data.source": str((folder / f"{data}.jsonl").resolve()), "model.dropout": "0"}
    variants = []
    for name in arguments.variants:
        words = shlex.split(VARIANTS[name].format(more=(folder / f"{data}-more.jsonl").resolve()))
        changes = dict(word.split("=", 1) for word in words)
        # What one variant changes, all of them have to say.
        variants += ["--variant", f"{name}: {shlex.join(f'{key}={value}' for key, value in (base | changes).items())}"]
    settings = FIXED | {"data.holdout_fraction": HELDOUT[data]}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [
        sys.executable, "-m", "moe_scale.cli", "sweep", "recipes/switch.py", "--output_dir", str(folder / data),
        "--parallel", str(arguments.parallel), *variants, "--max_steps", str(arguments.max_steps), "--eval.every",
        str(max(1, arguments.max_steps // 20)), *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each variant the curves of all panels, as points of step and value, the mean over layers."""
    trials = (planned.trial for planned in plan_of(folder).trials)
    return {trial.variant: read_run(folder / "trials" / trial.name) for trial in trials}


def plan_of(folder: Path) -> Plan:
    plan = read_plan(folder)
    if plan is None:
        raise SystemExit(f"error: {folder} holds no sweep")
    return plan


def read_run(run: Path) -> dict[str, Any]:
    records = read_records(run)
    curves: dict[str, list[list[float]]] = {name: [] for name in PANELS}
    for record in records:
        for name in PANELS:
            if name in record:
                value = record[name]
                mean = statistics.fmean(value) if isinstance(value, list) else value
                curves[name].append([record["step"], round(mean, 5)])
    return {name: points for name, points in curves.items() if points}


# --- what came of them -----------------------------------------------------------------------------------------------


def epoch_steps(texts: dict[str, Any], data: str, variant: str) -> float:
    """Steps of a pass over the training text."""
    name = f"{data}-more" if "{more}" in VARIANTS[variant] else data
    return texts[name]["bytes"] * (1 - HELDOUT[data]) / BYTES_A_STEP


def table(texts: dict[str, Any], data: str, runs: dict[str, Any]) -> str:
    """Best and last held-out loss of each run, and what its routers and experts had come to."""
    lines = [
        "| changed | best held-out loss | after epoch | last held-out loss | last training loss | load max / mean "
        "| dropped | entropy | scores | experts' norm, first to last |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant, curves in runs.items():
        step, best = min(curves["eval/loss"], key=lambda point: point[1])
        late = [f"{mean_of_last(curves[name]):.2f}" if name in curves else "" for name in LATE]
        norm = curves.get("weight_norm/experts")
        grown = f"{norm[0][1]:.1f} to {norm[-1][1]:.1f}" if norm else ""
        cells = [
            variant, f"{best:.3f}", f"{step / epoch_steps(texts, data, variant):.1f}",
            f"{curves['eval/loss'][-1][1]:.3f}", f"{mean_of_last(curves['lm_loss']):.3f}", *late, grown,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of_last(points: list[list[float]], count: int = 5) -> float:
    return statistics.fmean(value for _, value in points[-count:])


def draw(texts: dict[str, Any], data: str, runs: dict[str, Any], path: Path) -> None:
    """All panels over passes through the training text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(19, 8.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        for place, (variant, curves) in enumerate(runs.items()):
            if points := curves.get(name):
                epochs = [step / epoch_steps(texts, data, variant) for step, _ in points]
                thick = 2.4 if variant == "switch" else 1.2
                axis.plot(epochs, [value for _, value in points], label=variant, color=f"C{place}", linewidth=thick)
        axis.set(title=title, xlabel="passes over the training text")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"Trained past the point where the held-out loss turns: {data} text")
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
