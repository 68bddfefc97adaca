"""The flagship recipe: its scales, what a run leaves behind, and the settings that change how it trains."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from moe_scale.config import SCALES, LMConfig
from moe_scale.errors import ConfigError
from moe_scale.models.counts import num_active_params, num_params
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import records
from tests.unit.checkpoint.builders import write_checkpoint

TRAIN_CASES = str(REPO / "tests" / "distributed" / "train_cases.py")
RANKS_OF_SCALE = {"cpu": (1, 1), "1gpu": (1, 1), "1node": (8, 8), "multinode": (32, 8)}


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_passes_the_checks(scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world_size, per_node = RANKS_OF_SCALE[scale]
    kind = "cpu" if scale == "cpu" else "cuda"
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, world_size, 0, per_node, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device(kind, "a device", bf16=True, fp16=True))
    job = prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run")])
    assert job.config.scale == scale, "the scale that the machine has is the default"
    assert job.plan.stage == 3


def test_the_large_scales_are_the_flagship() -> None:
    for scale in ("1gpu", "1node", "multinode"):
        assert "model" not in RECIPE.scales[scale], "the dataclass defaults are the flagship's figures"
    config = RECIPE.config_class()
    model, moe = config.model, config.moe
    assert (model.num_layers, model.d_model, model.num_heads, model.num_kv_heads) == (16, 1024, 16, 8)
    assert (moe.num_experts, moe.top_k, moe.intermediate_size, moe.aux_loss_weight) == (64, 2, 512, 0.001)
    assert (model.vocab_size, model.attention_gate) == (50304, "elementwise")
    assert num_params(model, moe).total == 1_730_317_312
    assert num_active_params(model, moe).total < 0.12 * num_params(model, moe).total


def test_what_a_run_leaves_and_what_resuming_continues(tiny_flags: list[str], tmp_path: Path) -> None:
    """One process trains every case; what each case is about is asserted below, by its folder's name."""
    tiny = [*tiny_flags, "--telemetry.tensorboard", "false"]
    whole = [*tiny_flags, "--checkpoint.every", "2", "--output_dir", str(tmp_path / "whole")]
    cases = {
        "whole": [],
        "8bit": ["--optim.name", "adamw8bit"],
        "dense": ["--moe.enabled", "false"],
        "every-other": ["--moe.every", "2", "--model.attention_gate", "headwise"],
        "capacity": ["--moe.dispatch", "capacity", "--moe.capacity_factor", "0.5", "--moe.min_capacity", "1"],
        "wsd": ["--optim.schedule", "wsd", "--optim.decay_steps", "2"],
        "bf16": ["--deepspeed_override", "bf16.enabled=true", "--model.attention_gate", "none"],
        "offload": ["--deepspeed_override", "zero_optimization.offload_optimizer.device=cpu"],
    }
    argvs = {name: [*tiny, *flags, "--output_dir", str(tmp_path / name)] for name, flags in cases.items()}
    argvs["whole"] = whole
    if devices.detect().fp16:
        argvs["fp16"] = [*tiny, "--deepspeed_override", "fp16.enabled=true", "--output_dir", str(tmp_path / "fp16")]
    listed = tmp_path / "cases.json"
    listed.write_text(json.dumps(list(argvs.values())))
    printed = run_ranks(1, [TRAIN_CASES, str(listed)])
    assert "Warning" not in printed, "a user should read no noise"

    steps = {name: [r for r in records(tmp_path / name) if "loss" in r] for name in argvs}
    for name, logged in steps.items():
        assert len(logged) == 4, name
        assert all(math.isfinite(r["loss"]) for r in logged), name

    first = steps["whole"][0]
    numbers = ["step", "tokens", "loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "lr"]
    numbers += ["tokens_per_s", "step_time_s", "memory_bytes"]
    assert not [key for key in numbers if not isinstance(first[key], int | float)]
    for key in ("entropy", "load_cv", "load_max", "dropped"):
        assert len(first[f"router/{key}"]) == 2, "one figure a layer"
    parts = {"embedding", "attention", "router", "experts", "norms"}
    assert {key.removeprefix("grad_norm/") for key in first if key.startswith("grad_norm/")} == parts
    squares = sum(first[f"grad_norm/{part}"] ** 2 for part in parts)
    assert math.isclose(math.sqrt(squares), first["grad_norm"], rel_tol=1e-9)
    scores = [r for r in records(tmp_path / "whole") if "eval/loss" in r]
    assert [r["step"] for r in scores] == [2, 4]
    assert math.isclose(scores[-1]["eval/perplexity"], math.exp(scores[-1]["eval/loss"]), rel_tol=1e-9)
    assert 0 < scores[-1]["eval/sink_share"] < 1
    assert list((tmp_path / "whole" / "tensorboard").iterdir())
    saved = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert saved["settings"]["model"]["num_layers"] == 2
    assert saved["packages"]["deepspeed"]

    assert "router/entropy" not in steps["dense"][0]
    assert "grad_norm/ffn" in steps["dense"][0]
    assert len(steps["every-other"][0]["router/entropy"]) == 1
    assert max(steps["capacity"][0]["router/dropped"]) > 0.2
    assert max(steps["whole"][0]["router/dropped"]) == 0
    assert steps["wsd"][-1]["lr"] < steps["wsd"][1]["lr"]
    assert abs(steps["8bit"][-1]["loss"] / steps["whole"][-1]["loss"] - 1) < 0.01
    assert abs(steps["offload"][-1]["loss"] - steps["whole"][-1]["loss"]) < 1e-4

    # Cut the last half off and continue: the same figures, to the bit.
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step_00000004")
    listed.write_text(json.dumps([[*whole, "--resume", "must"]]))
    run_ranks(1, [TRAIN_CASES, str(listed)])
    again = [r for r in records(tmp_path / "whole") if "loss" in r]
    assert [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in again] == [
        (r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in steps["whole"]
    ]


@pytest.mark.parametrize(("ranks", "expected"), [((4, 4), 4), ((6, 6), 2), ((16, 8), 8), ((3, 3), 1)])
def test_experts_spread_over_what_a_node_has(
    ranks: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, ranks[0], 0, ranks[1], "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device("cuda", "a device", bf16=True, fp16=True))
    out = ["--output_dir", str(tmp_path / "run")]
    assert prepare_job(RECIPE, out).config.moe.ep_size == expected
    unsharded = [*out, "--deepspeed_config", "ds_configs/zero1_1node.json"]
    assert prepare_job(RECIPE, unsharded).config.moe.ep_size == 1, "ZeRO-1 has no expert parallelism"


def test_a_checkpoint_of_other_settings_is_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path / "run")]
    job = prepare_job(RECIPE, [*tiny_flags, *out])
    assert isinstance(job.config, LMConfig)
    folder = write_checkpoint(tmp_path / "run", job.config, step=2, world_size=2)
    changed = ["--optim.lr", "0.5"]
    again = prepare_job(RECIPE, [*tiny_flags, *out, *changed, "--resume", "must", "--max_steps", "9"])
    assert again.resume_from == folder
    assert again.remarks == ("optim.lr was 0.003 and is 0.5",), "the run goes on, and says what it does otherwise"
    changed += ["--model.d_model", "64", "--moe.top_k", "1"]
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*tiny_flags, *out, "--resume", "must", *changed])
    assert {p.where for p in refused.value.problems} == {"resume: model.d_model", "resume: moe.top_k"}


def test_gradients_of_several_micro_batches_add_up_in_fp32(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--output_dir", str(tmp_path / "run"), "--deepspeed_override", "bf16.enabled=true"]
    assert "data_types" not in prepare_job(RECIPE, flags).plan.json, "one micro-batch is no sum"
    several = prepare_job(RECIPE, [*flags, "gradient_accumulation_steps=4"]).plan.json
    assert several["data_types"] == {"grad_accum_dtype": "fp32"}
