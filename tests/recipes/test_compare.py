"""``moe-scale compare``: what its files promise, on one rank and on two, and what is refused before any training."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_scale.cli import main
from moe_scale.config import MoEConfig
from moe_scale.errors import ConfigError
from moe_scale.tools import compare, layer_comparison, peers
from moe_scale.tools.layer_comparison import LayerShape, compare_layers, hugging_face_problems
from tests.ranks import REPO, run_ranks

RECIPE = str(REPO / "recipes" / "lm_16l.py")
PROMISED = [
    "variant", "loss", "held-out loss", "largest loss difference", "layer: output difference", "layer: ms forward",
    "layer: ms backward", "layer: peak memory, MiB", "tokens/s", "ms a step", "peak memory, MiB",
    "all-to-all, KiB a step", "dropped", "max/mean load",
]  # fmt: skip
VARIANTS = ["custom", "deepspeed", "autoep", "dense", "hf"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_backends_side_by_side(num_ranks: int, tiny_flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "compare"
    flags = [*tiny_flags, "--moe.ep_size", str(num_ranks), "--output_dir", str(out), "--rounds", "2"]
    printed = run_ranks(num_ranks, [str(REPO / "recipes" / "compare_moe.py"), *flags])
    rows = {row["variant"]: row for row in json.loads((out / "compare.json").read_text())}
    assert list(rows) == VARIANTS
    trained = [rows[name] for name in VARIANTS if name != "hf"]

    for name in ("deepspeed", "autoep"):
        assert rows[name]["largest_difference"] < 1e-5
    assert rows["custom"]["largest_difference"] is None, "it is what the others are compared with"
    assert abs(rows["dense"]["loss"] - rows["custom"]["loss"]) > 1e-3, "another model has another curve"
    for row in trained:
        assert len(row["losses"]) == row["steps"] == 4
        assert row["tokens_per_s"] > 0
        assert row["step_ms"] > 0
        assert (row["world_size"], row["ep_size"]) == (num_ranks, num_ranks)

    sent = {name: rows[name]["all_to_all_bytes_per_step"] for name in VARIANTS}
    if num_ranks == 1:
        assert not any(sent.values())
    else:
        assert sent["custom"] > 0
        assert sent["deepspeed"] > 0
        assert sent["custom"] == pytest.approx(sent["autoep"], rel=0.01)
        assert sent["dense"] == 0
    for name in ("custom", "deepspeed", "autoep"):
        assert rows[name]["dropped_share"] == 0
        assert 1 <= rows[name]["load_max"] <= 2, "top-2 of 4 experts cannot be less even"
        assert rows[name]["load"] == rows["custom"]["load"]
        assert all(sum(layer) == num_ranks * 64 * 2 for layer in rows[name]["load"])

    for row in rows.values():
        assert row["layer_forward_ms"] > 0
        assert row["layer_backward_ms"] > 0
        # At least the gradients of input and weights, at most what a careless layer of this size would take.
        weights = 4 * 32 * (3 * 16 * (2 if row["variant"] == "dense" else 4))
        assert weights < row["layer_peak_bytes"] < 40 * weights
        assert row["layer_shape"] == "2 x 32 tokens, d_model 32, fp32"
    for name in ("deepspeed", "autoep", "hf"):
        assert 0 <= rows[name]["layer_difference"] < 1e-5
    assert rows["dense"]["layer_difference"] is None, "another layer has another output"
    parts = rows["custom"]["layer_parts"]
    assert {"route", "plan", "statistics", "experts"} <= set(parts)
    assert all(times["forward_ms"] > 0 for times in parts.values())
    assert all(rows["hf"][key] is None for key in ("loss", "tokens_per_s", "losses", "load"))

    header, _, *lines = [line for line in (out / "compare.md").read_text().splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == PROMISED
    assert [line.split("|")[1].strip() for line in lines] == VARIANTS
    assert (out / "compare.png").stat().st_size > 5000
    assert "Traceback" not in printed


def test_layers_with_other_weights_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a difference of zero is one that was looked for."""
    config, shape = MoEConfig(num_experts=4, intermediate_size=8), LayerShape(2, 8, 16, "fp32")
    other = peers.hugging_face_block
    monkeypatch.setattr(
        layer_comparison, "hugging_face_block", lambda config, d_model, how: other(config, d_model, how, seed=1)
    )
    rows = compare_layers(["custom", "hf"], config, shape, torch.device("cpu"), rounds=1)
    assert rows["hf"]["layer_difference"] > 0.1


@pytest.mark.parametrize("router", ["softmax", "noisy", "sigmoid", "expert_choice", "hash"])
@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_every_router_has_a_layer_to_time(router: Any, scope: Any) -> None:
    dispatch: Any = "capacity" if router == "expert_choice" else "dropless"
    config = MoEConfig(
        num_experts=4, intermediate_size=8, router=router, aux_loss_scope=scope, dispatch=dispatch, ep_size=2
    )
    shape = LayerShape(2, 8, 16, "bf16")
    rows = compare_layers(["custom", "dense"], config, shape, torch.device("cpu"), rounds=1)
    assert ("layer_parts" in rows["custom"]) == (router not in ("expert_choice", "hash"))
    assert rows["custom"]["layer_forward_ms"] > 0


def test_hugging_faces_block_names_what_it_lacks() -> None:
    assert hugging_face_problems(MoEConfig()) == []
    assert hugging_face_problems(MoEConfig(top_k=1, renormalize=False)) == []
    others = {"router": "sigmoid", "dispatch": "capacity", "activation": "gelu", "expert_bias": True, "residual": True}
    for name, value in others.items():
        (problem,) = hugging_face_problems(MoEConfig(**{name: value}))
        assert problem.where == f"moe.{name}"
        assert "leave hf out of --variants" in problem.allowed


# --- bad input


def refused(*flags: str) -> list[str]:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    arguments, rest = parser.parse_known_args([RECIPE, *flags])
    with pytest.raises(ConfigError) as error:
        compare.run(arguments, rest)
    return [str(problem) for problem in error.value.problems]


def test_problems_of_all_variants_come_before_any_training(tiny_flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "compare"
    found = refused(*tiny_flags, "--moe.router", "sigmoid", "--moe.top_k", "9", "--output_dir", str(out))
    assert sum("moe.backend = deepspeed" in line for line in found) == 1
    assert sum("moe.backend = autoep" in line for line in found) == 1
    assert sum(line.startswith("moe.top_k") for line in found) == 1, "what is wrong for all is said once"
    assert not out.exists()


def test_a_layer_that_hugging_face_lacks_is_refused(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--moe.expert_bias", "true", "--output_dir", str(tmp_path / "compare")]
    (found,) = refused(*flags, "--variants", "custom", "hf")
    assert found.startswith("moe.expert_bias: true with the variant hf")
    (found,) = refused(*flags, "--variants", "hf")
    assert found == "--variants: hf alone; add one that is trained, as custom"


def test_what_a_comparison_varies_is_not_given(tiny_flags: list[str], tmp_path: Path) -> None:
    given = [
        "--moe.backend=custom",
        "--moe.enabled",
        "false",
        "--resume",
        "auto",
        "--early_stopping.metric",
        "eval/loss",
    ]
    found = refused(*tiny_flags, *given, "--output_dir", str(tmp_path / "compare"))
    assert [line.partition(":")[0] for line in found] == [
        "--moe.backend", "--moe.enabled", "--resume", "--early_stopping.metric",
    ]  # fmt: skip


@pytest.mark.parametrize("held", ["compare.json", "custom/run.json"])
def test_a_folder_that_holds_a_comparison_is_left_alone(held: str, tiny_flags: list[str], tmp_path: Path) -> None:
    """A finished one, and one that was interrupted in its first variant; whichever variants are asked for now."""
    out = tmp_path / "compare"
    (out / held).parent.mkdir(parents=True)
    (out / held).write_text("old")
    for variants in (["custom"], ["deepspeed", "dense"]):
        (found,) = refused(*tiny_flags, "--output_dir", str(out), "--variants", *variants)
        assert found == f"output_dir: {out} already holds a comparison; choose another --output_dir"
    assert [path.read_text() for path in out.rglob("*") if path.is_file()] == ["old"]


@pytest.mark.parametrize("path", ["nowhere.py", "recipes", "tests/ranks.py", "README.md"])
def test_a_file_without_a_recipe_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        compare.load_recipe(REPO / path)


@pytest.mark.parametrize("flags", [["--variants", "custm"], ["--rounds", "0"], ["--rounds", "x"]])
def test_slips_in_its_own_flags_are_named(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", RECIPE, *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["nowhere.py"], [RECIPE, "--no.such", "1"]])
def test_one_message_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_scale.cli", "compare", *arguments, "--output_dir", str(tmp_path / "compare")],
        capture_output=True, text=True, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert any(word in done.stderr for word in arguments)
    assert not (tmp_path / "compare").exists()
