"""A model is pruned, trained on by its recipe and used, as a user does it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import moe_scale
from moe_scale.cli import main
from moe_scale.models.pruning import sparse_layers
from tests.curves import write_words
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import records
from tests.unit.checkpoint.builders import small_config, write_checkpoint

RECIPE = str(REPO / "recipes" / "lm_16l.py")
STANDING_STILL = ("--recover", "2", "--optim.lr", "1e-12", "--moe.bias_update_rate", "0")
"""A recovery that ends with the weights that it begins with."""


def said_of(pruned: Path) -> list[dict]:
    """The rows of the table."""
    return json.loads((pruned / "prune.json").read_text())["models"]


def test_a_recovery_trains_the_pruned_weights(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_words(tmp_path / "text.jsonl", 40)
    config = small_config(tmp_path)
    where = {"source": str(tmp_path / "text.jsonl"), "cache_dir": str(tmp_path / "cache")}
    config = replace(
        config,
        model=replace(config.model, vocab_size=257),
        data=replace(config.data, tokenizer="bytes", seq_len=32, **where),
        eval=replace(config.eval, max_tokens=500),
        telemetry=replace(config.telemetry, wandb="off"),
    )
    write_checkpoint(tmp_path / "run", config)
    pruned, ds = tmp_path / "pruned", tmp_path / "bf16.json"
    ds.write_text(json.dumps(json.loads((tmp_path / "ds.json").read_text()) | {"bf16": {"enabled": True}}))
    argv = ["prune", str(tmp_path / "run"), "--output_dir", str(pruned), "--calibration_tokens", "200"]
    main([*argv, *STANDING_STILL, "--deepspeed_config", str(ds)])
    full, row = said_of(pruned)
    assert row["loss"] != full["loss"]
    assert row["recovered_loss"] == pytest.approx(row["loss"], rel=1e-3)  # its weights are rounded to bf16
    (measured,) = [record["eval/loss"] for record in records(pruned / "recovered") if "eval/loss" in record]
    assert measured == pytest.approx(row["recovered_loss"], rel=1e-2)
    recovered = moe_scale.load_model(pruned / "recovered")
    assert {layer.config.num_experts for layer in sparse_layers(recovered).values()} == {2}
    for model in (pruned, pruned / "recovered"):
        capsys.readouterr()
        main(["generate", "--run", str(model), "--prompt", "et", "--max_tokens", "3", "--temperature", "0"])
        assert "3 tokens in" in capsys.readouterr().err


@pytest.mark.long
def test_a_trained_run_is_pruned_and_trained_on(tiny_flags: list[str], tmp_path: Path) -> None:
    run, pruned, own = (tmp_path / name for name in ("run", "pruned", "own"))
    run_ranks(1, [RECIPE, *tiny_flags, "--output_dir", str(run)])
    main(["prune", str(run), "--output_dir", str(pruned), "--by", "reconstruction", *STANDING_STILL])
    full, row = said_of(pruned)
    assert full["loss"] == pytest.approx(records(run)[-1]["eval/loss"], rel=1e-4)
    assert row["recovered_loss"] == pytest.approx(row["loss"], rel=1e-5)
    # The model folder starts a run of its own.
    flags = ["--config", str(pruned / "settings.yaml"), *tiny_flags[2:], "--max_steps", "1"]
    flags += ["--optim.warmup_steps", "0", "--optim.lr", "1e-12", "--data.seq_len", "32", "--eval.max_tokens", "256"]
    run_ranks(1, [RECIPE, *flags, "--telemetry.wandb", "off", "--output_dir", str(own)])
    assert records(own)[-1]["eval/loss"] == pytest.approx(row["loss"], rel=1e-4)
