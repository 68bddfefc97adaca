"""Draw the README's picture of a run: ``python docs/make_figures.py runs/lm_16l docs/img/run.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(run_dir: Path, out: Path) -> None:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "lm_loss" in r]
    scores = [r for r in records if "eval/loss" in r]
    sparse = range(len(steps[0].get("router/load_max", [])))

    figure, (loss, load) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    loss.plot([r["tokens"] for r in steps], [r["lm_loss"] for r in steps], label="training")
    loss.plot([r["tokens"] for r in scores], [r["eval/loss"] for r in scores], "o-", label="held out")
    loss.axhline(scores[-1]["eval/unigram_entropy"], color="grey", linestyle="--", label="unigram entropy, held out")
    loss.set(xlabel="tokens", ylabel="loss, nats a token", title="Loss")
    loss.legend()
    for layer in sparse:
        load.plot(
            [r["tokens"] for r in steps], [r["router/load_max"][layer] for r in steps], label=f"sparse layer {layer}"
        )
    load.axhline(1, color="grey", linestyle="--", label="even")
    load.set(xlabel="tokens", ylabel="largest load / mean load", title="Load of the fullest expert")
    load.legend()
    for axes in (loss, load):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
