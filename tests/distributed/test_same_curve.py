"""One training run, spread in every way that is supported, gives one curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks

STEPS = 20
TINY = """
max_steps: 20
model: {num_layers: 2, d_model: 32, num_heads: 4, num_kv_heads: 2, vocab_size: 50304}
moe: {num_experts: 4, intermediate_size: 16}
data: {seq_len: 32, num_workers: 0}
optim: {warmup_steps: 2, lr: 0.003}
eval: {every: 0, max_tokens: 256, sample_tokens: 0}
telemetry: {every: 1, tensorboard: false, wandb: "off"}
"""
DS_JSON = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}
SEQUENCES_PER_STEP = 8

Curve = list[tuple[float, float]]


class Runs:
    """Command lines and results of runs that share a model, data and the sequences of each step."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "tiny.yaml").write_text(TINY)
        (folder / "ds.json").write_text(json.dumps(DS_JSON))

    def argv(
        self, name: str, world_size: int, *, stage: int, ds: tuple[str, ...] = (), extra: tuple[str, ...] = ()
    ) -> list[str]:
        accum = SEQUENCES_PER_STEP // (DS_JSON["train_micro_batch_size_per_gpu"] * world_size)
        return [
            "--config",
            str(self.folder / "tiny.yaml"),
            "--deepspeed_config",
            str(self.folder / "ds.json"),
            "--output_dir",
            str(self.folder / name),
            "--deepspeed_override",
            f"zero_optimization.stage={stage}",
            f"gradient_accumulation_steps={accum}",
            *ds,
            *extra,
        ]

    def train(self, world_size: int, cases: dict[str, list[str]]) -> dict[str, Curve]:
        listed = self.folder / f"cases_{world_size}.json"
        listed.write_text(json.dumps(list(cases.values())))
        run_ranks(world_size, [str(Path(__file__).with_name("train_cases.py")), str(listed)])
        return {name: self.curve(name) for name in cases}

    def curve(self, name: str) -> Curve:
        records = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [(r["loss"], r["grad_norm"]) for r in records if "loss" in r]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one_rank(runs: Runs) -> Curve:
    """The curve of one rank without any sharding, against which all others are held."""
    curve = runs.train(1, {"one": runs.argv("one", 1, stage=0)})["one"]
    assert len(curve) == STEPS
    assert curve[0][0] > curve[-1][0], "the model must learn something for its curve to say something"
    return curve


def assert_same(curves: dict[str, Curve], expected: Curve, tolerance: float) -> None:
    differences = {
        name: (
            max(abs(a[0] - b[0]) for a, b in zip(curve, expected, strict=True)),
            max(abs(a[1] / b[1] - 1) for a, b in zip(curve, expected, strict=True)),
        )
        for name, curve in curves.items()
    }
    wrong = {name: pair for name, pair in differences.items() if max(pair) > tolerance}
    assert not wrong, f"largest difference of the loss, largest relative difference of the gradient norm: {wrong}"


def test_zero_stages_and_backends_on_two_ranks(runs: Runs, one_rank: Curve) -> None:
    cases = {f"zero{stage}": runs.argv(f"zero{stage}", 2, stage=stage) for stage in range(4)}
    for backend in ("custom", "deepspeed", "autoep"):
        for ep_size in (1, 2):
            name = f"{backend}-ep{ep_size}"
            flags = ("--moe.backend", backend, "--moe.ep_size", str(ep_size))
            cases[name] = runs.argv(name, 2, stage=3, extra=flags)
    cases["custom-ep2-built-whole"] = runs.argv(
        "custom-ep2-built-whole", 2, stage=3, extra=("--moe.ep_size", "2", "--zero_init", "false")
    )
    for stage in (1, 2):
        name = f"autoep-ep2-zero{stage}"
        cases[name] = runs.argv(name, 2, stage=stage, extra=("--moe.backend", "autoep", "--moe.ep_size", "2"))
    cases["checkpointed"] = runs.argv(
        "checkpointed", 2, stage=3, extra=("--moe.ep_size", "2", "--model.activation_checkpointing", "true")
    )
    assert_same(runs.train(2, cases), one_rank, tolerance=1e-4)


def test_four_ranks(runs: Runs, one_rank: Curve) -> None:
    cases = {}
    for backend in ("custom", "deepspeed", "autoep"):
        for ep_size in (1, 2, 4):
            name = f"{backend}-ep{ep_size}-world4"
            flags = ("--moe.backend", backend, "--moe.ep_size", str(ep_size))
            cases[name] = runs.argv(name, 4, stage=3, extra=flags)
    assert_same(runs.train(4, cases), one_rank, tolerance=1e-4)
