"""Loss-free balancing on two ranks: it evens out a skewed load, and its biases live through precision and resuming."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.recipes.conftest import TINY, records

WORKER = str(Path(__file__).with_name("balancing_cases.py"))
# A rate so high that a run that lost its biases would choose other experts, and so have another loss; after an odd
# number of steps no bias can be back at zero. It is not a bf16 number, so that rounding would show.
RATE = 0.09
SAVED_AT, STEPS = 3, 5
PRECISIONS = {"fp32": (), "bf16": ("bf16.enabled=true",)}


def argv(folder: Path, name: str, *, overrides: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> list[str]:
    found = ["--config", str(folder / "tiny.yaml"), "--deepspeed_config", str(folder / "ds.json")]
    found += ["--output_dir", str(folder / name), "--telemetry.tensorboard", "false", "--eval.every", "0"]
    found += ["--eval.sample_tokens", "0", "--optim.schedule", "constant", "--max_steps", str(STEPS)]
    found += ["--moe.router", "sigmoid", "--moe.aux_loss_weight", "0", "--moe.bias_update_rate", str(RATE), *flags]
    return [*found, *(["--deepspeed_override", *overrides] if overrides else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("balancing")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """Of one start of two ranks, which train every case."""
    (folder / "tiny.yaml").write_text(TINY)
    ds_json = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    (folder / "ds.json").write_text(json.dumps(ds_json))
    cases: dict[str, list[list[str]]] = {}
    for name, overrides in PRECISIONS.items():
        half = argv(folder, f"{name}-resumed", overrides=overrides, flags=("--max_steps", str(SAVED_AT)))
        rest = argv(folder, f"{name}-resumed", overrides=overrides, flags=("--resume", "must"))
        cases[f"{name}-whole"] = [argv(folder, f"{name}-whole", overrides=overrides)]
        cases[f"{name}-resumed"] = [half, rest]
    two_steps = ("--max_steps", "2")
    for stage in (0, 1):
        overrides = ("bf16.enabled=true", f"zero_optimization.stage={stage}")
        cases[f"bf16-zero{stage}"] = [argv(folder, f"bf16-zero{stage}", overrides=overrides, flags=two_steps)]
    built_whole = (*two_steps, "--zero_init", "false")
    cases["bf16-built-whole"] = [argv(folder, "bf16-built-whole", overrides=PRECISIONS["bf16"], flags=built_whole)]
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(2, [WORKER, str(folder / "cases.json"), str(folder / "results.json")], timeout=150)
    return json.loads((folder / "results.json").read_text())


def test_selection_biases_even_out_a_skewed_stream(results: dict[str, Any]) -> None:
    """The largest load over the mean falls below 1.2 without any auxiliary loss; without biases it stays above 2."""
    loads = results["loads"]
    assert loads["0.0"]["max_over_mean"] > 2
    assert loads["0.01"]["max_over_mean"] < 1.2
    assert loads["0.01"]["agree"]


@pytest.mark.parametrize("name", ["fp32-whole", "fp32-resumed", "bf16-whole", "bf16-zero1"])
def test_all_ranks_have_the_same_selection_biases(name: str, results: dict[str, Any]) -> None:
    """Although each sees a load of its own: what moves them is the load of all ranks together."""
    assert all(step["agree"] for step in results[name])


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_selection_biases_survive_a_checkpoint(precision: str, results: dict[str, Any], folder: Path) -> None:
    """Some steps, a checkpoint, some more: biases and losses are to the bit those of a run in one go."""
    whole, resumed = results[f"{precision}-whole"], results[f"{precision}-resumed"]
    assert len(whole) == STEPS
    assert all(any(layer) for layer in whole[SAVED_AT - 1]["biases"]), "there must be something to lose"
    assert [step["biases"] for step in resumed] == [step["biases"] for step in whole]
    losses = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in records(folder / f"{precision}-{name}") if "loss" in r]
        for name in ("whole", "resumed")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["bf16-whole", "bf16-resumed", "bf16-built-whole", "bf16-zero0", "bf16-zero1"])
def test_selection_biases_stay_fp32_under_bf16(name: str, results: dict[str, Any]) -> None:
    """bf16 near 1 has steps of 0.008: an update of 0.001 would be rounded away. Here every bias is a whole number of
    updates, to fp32's precision."""
    assert {tuple(step["weights"]) for step in results[name]} == {("torch.bfloat16",)}
    assert {tuple(step["types"]) for step in results[name]} == {("torch.float32",)}
    for step in results[name]:
        for value in itertools.chain(*step["biases"]):
            assert value / RATE == pytest.approx(round(value / RATE), abs=1e-5)
