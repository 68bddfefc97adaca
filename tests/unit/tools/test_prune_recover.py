"""The recovery of a pruned model: its settings, and how its process ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moe_scale.config import LMConfig
from moe_scale.errors import ConfigError
from moe_scale.settings import read_settings
from moe_scale.tools.prune_recover import LOG, SETTINGS, Recovery, RecoveryError
from moe_scale.train.faults import PreemptedError
from tests.ranks import REPO
from tests.unit.checkpoint.builders import small_config


def test_a_recovery_has_the_runs_settings_but_for_a_short_ones(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run = replace(
        config,
        max_steps=5000,
        max_time="1:00:00",
        moe=replace(config.moe, num_experts=6, ep_size=4),
        optim=replace(config.optim, lr=2e-3, warmup_steps=100, schedule="wsd", decay_steps=1000, weight_decay=0.3),
        early_stopping=replace(config.early_stopping, metric="eval/loss"),
        checkpoint=replace(config.checkpoint, every=100, save_best="eval/loss"),
        faults=replace(config.faults, spike_factor=2.0),
    )
    found = Recovery(50, 2, Path("recipes/lm_16l.py")).settings(run, "model")
    assert not found.problems()
    assert (found.max_steps, found.max_time, found.model.pretrained) == (50, "", "model")
    assert (found.optim.lr, found.optim.warmup_steps, found.optim.weight_decay) == (pytest.approx(2e-4), 5, 0.3)
    assert (found.moe.ep_size, found.moe.num_experts) == (2, 6)
    assert (found.best_metric, found.faults.spike_factor, found.checkpoint.every, found.eval.every) == ("", 0.0, 0, 0)
    assert found.seed != run.seed
    assert found.data == run.data
    assert not Recovery(1, 1, Path("recipes/lm_16l.py")).settings(run, "model").problems()


def test_a_number_of_steps_is_no_setting_of_a_recovery(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config = replace(config, data=replace(config.data, tokenizer="bytes"), model=replace(config.model, vocab_size=264))
    given = ("--deepspeed_config", str(REPO / "ds_configs" / "zero3_cpu_fp32.json"), "--max_steps")
    recipe = REPO / "recipes" / "lm_16l.py"
    assert Recovery(2, 1, recipe, (*given, "2")).check(config, tmp_path).config.max_steps == 2
    with pytest.raises(ConfigError, match="--max_steps: 9 as a setting of the recovery"):
        Recovery(2, 1, recipe, (*given, "9")).check(config, tmp_path)


@pytest.mark.parametrize(
    ("given", "named", "weight"),
    [
        (("--model.d_model", "64"), "--model.d_model", "embedding.weight is (264, 16) and would be (264, 64)"),
        (("--moe.shared_intermediate_size", "8"), "--moe.shared_intermediate_size", "is (none) and would be ("),
        (("--model.num_layers", "5"), "--model.num_layers", "is (none) and would be ("),
    ],
)
def test_settings_of_another_model_are_no_settings_of_a_recovery(
    given: tuple[str, ...], named: str, weight: str, tmp_path: Path
) -> None:
    config = small_config(tmp_path)
    config = replace(config, data=replace(config.data, tokenizer="bytes"), model=replace(config.model, vocab_size=264))
    fp32 = ("--deepspeed_config", str(REPO / "ds_configs" / "zero3_cpu_fp32.json"))
    recovery = Recovery(2, 1, REPO / "recipes" / "lm_16l.py", (*fp32, *given))
    with pytest.raises(ConfigError) as caught:
        recovery.check(config, tmp_path)
    (problem,) = caught.value.problems
    assert problem.where == named
    assert weight in problem.what
    # What changes no shape is a recovery's to change, and adapters beside the weights are.
    own = ("--moe.aux_loss_weight", "0.5", "--moe.bias_update_rate", "0", "--lora.rank", "2")
    assert Recovery(2, 1, recovery.recipe, (*fp32, *own)).check(config, tmp_path).config.lora.rank == 2


STUB = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]).parent
def stop(*_):
    (here / "stopped").touch()
    raise SystemExit(0)
signal.signal(signal.SIGTERM, stop)
(here / "argv").write_text(" ".join(sys.argv[1:]))
if "--fail" in sys.argv:
    raise SystemExit("out of luck")
time.sleep(60 if "--wait" in sys.argv else 0)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path / "stub.py"


def test_the_recipe_is_given_the_settings_and_what_wins_over_them(recipe: Path, tmp_path: Path) -> None:
    config, folder = small_config(tmp_path), tmp_path / "new" / "model"
    recovery = Recovery(20, 1, recipe, ("--optim.lr", "0.5"))
    assert recovery.run(config, tmp_path / "weights", folder) == folder / "recovered"
    argv = (folder / "argv").read_text().split()
    assert argv[:4] == ["--config", str(folder / SETTINGS), "--optim.lr", "0.5"]
    read = read_settings(LMConfig, {"cpu": {}}, argv[:4], machine_scale="cpu", recipe="lm_16l")
    assert not read.problems
    expected = recovery.settings(config, str(tmp_path / "weights"))
    assert read.config == replace(expected, optim=replace(expected.optim, lr=0.5))


def test_a_failure_tells_the_end_of_the_log(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecoveryError, match=r"exit code 1; the end of .*recover\.log:\n    out of luck"):
        Recovery(2, 1, recipe, ("--fail",)).run(small_config(tmp_path), tmp_path / "weights", tmp_path / "model")
    assert (tmp_path / "model" / LOG).read_text() == "out of luck\n"


def test_a_recovery_is_stopped_with_the_tool(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def ask_to_stop() -> None:
        while not (folder / "argv").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask_to_stop).start()
    with pytest.raises(PreemptedError):
        Recovery(2, 1, recipe, ("--wait",)).run(small_config(tmp_path), tmp_path / "weights", folder)
    assert (folder / "stopped").exists()
    assert signal.getsignal(signal.SIGTERM) == before
