"""``moe-scale sweep`` with real trials: stopped and continued, with one that fails, and as a W&B agent starts one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_scale import cli
from moe_scale.train.faults import EXIT_PREEMPTED
from tests.curves import CharacterRuns
from tests.ranks import REPO
from tests.recipes.conftest import records
from tests.recipes.test_launchers import Launch

pytestmark = pytest.mark.slow
RECIPE = "recipes/lm_16l.py"
STEPS = 40
TOOL = [sys.executable, "-m", "moe_scale.cli", "sweep"]

FLAKY = """
from dataclasses import replace
from recipes.lm_16l import RECIPE
from moe_scale.train.language_model import LanguageModelTask


class Flaky(LanguageModelTask):
    def build_model(self, groups):
        if self.config.moe.top_k == 2:
            raise RuntimeError("no luck with two")
        return super().build_model(groups)


RECIPE = replace(RECIPE, name="flaky", task=Flaky)

if __name__ == "__main__":
    from moe_scale.train.recipe import main

    main(RECIPE)
"""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Settings of a character model of which a trial takes some seconds."""
    (tmp_path / "data").mkdir()
    runs = CharacterRuns(tmp_path / "data")
    text = ["--data.source", str(runs.folder / "text.jsonl"), "--data.tokenizer", str(runs.folder / "tokenizer")]
    files = ["--config", str(runs.folder / "tiny.yaml"), "--deepspeed_config", str(runs.folder / "ds.json")]
    return [*files, *text, "--model.vocab_size", "128", "--output_dir", str(tmp_path / "sweep")]


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_sweep_that_is_stopped_goes_on(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of its second trial, as a batch system stops it."""
    out = tmp_path / "sweep"
    what = [
        "--grid",
        "moe.num_experts=2,4",
        "--grid",
        "moe.aux_loss_weight=0,0.01",
        "--max_steps",
        str(STEPS),
        "--eval.every",
        "20",
    ]
    argv = [*TOOL, RECIPE, *what, *flags]
    names = [f"num_experts-{n}_aux_loss_weight-{w}" for n in (2, 4) for w in ("0", "0.01")]
    run = out / "trials" / names[1]
    with Launch(argv, tmp_path / "first.out") as launch:
        assert launch.wait(until=lambda: lines_of(run) >= 4) is None, launch.output()
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait() == EXIT_PREEMPTED, launch.output()
        launch.assert_nothing_left()
        assert "stopped by SIGTERM: 1 of 4 trials are done; the same command goes on" in launch.output()
    assert (run / "checkpoints" / "latest").exists(), "the trial was told, and has saved"
    assert lines_of(run) < STEPS

    with Launch(argv, tmp_path / "second.out") as launch:
        assert launch.wait() == 0, launch.output()
        launch.assert_nothing_left()
        printed = launch.output()
    assert [f"{name}: eval/loss" in printed for name in names] == [True] * 4
    assert printed.count("trained before") == 1
    for name in names:
        logged = [record["step"] for record in records(out / "trials" / name) if "loss" in record]
        assert logged == list(range(1, STEPS + 1)), "each step once, whatever was stopped"
    assert "continuing from" in (out / "trials" / f"{names[1]}.log").read_text()

    results = json.loads((out / "results.json").read_text())
    assert {trial["state"] for trial in results["trials"]} == {"finished"}
    losses = [trial["scores"]["eval/loss"] for trial in results["trials"]]
    assert losses == sorted(losses)
    for trial in results["trials"]:
        assert trial["tokens"] == results["trials"][0]["tokens"] > 0
        assert trial["flops"] > trial["tokens"]
        assert trial["seconds"] > 0
        assert trial["parameters"] >= trial["active_parameters"] > 0
    by_experts = {e["setting"]: [level["mean"] for level in e["levels"]] for e in results["effects"]["effects"]}
    scores = {trial["name"]: trial["scores"]["eval/loss"] for trial in results["trials"]}
    assert by_experts["moe.num_experts"] == pytest.approx(
        [sum(scores[n] for n in names[i : i + 2]) / 2 for i in (0, 2)]
    )
    for name in ("settings.png", "curves-eval-loss.png", "curves-eval-perplexity.png", "sweep.md"):
        assert (out / name).stat().st_size > 1000

    for name in ("results.json", "sweep.md", "settings.png"):
        (out / name).unlink()
    cli.main(["sweep", RECIPE, "--report_only", "--output_dir", str(out), "--metric", "eval/perplexity"])
    assert json.loads((out / "results.json").read_text())["metric"] == "eval/perplexity"
    assert (out / "settings.png").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", RECIPE, *what, "--repeats", "2", *flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"--repeats: 2, but the sweep in {out} was started with 1" in said


def test_a_trial_that_fails_is_told_of_and_the_sweep_goes_on(flags: list[str], tmp_path: Path) -> None:
    """Two trials at once, of a recipe that the tool has never heard of."""
    out, recipe = tmp_path / "sweep", tmp_path / "flaky.py"
    recipe.write_text(FLAKY)
    argv = [*TOOL, str(recipe), "--grid", "moe.top_k=2,1", "--parallel", "2", *flags]
    with Launch(argv, tmp_path / "sweep.out") as launch:
        assert launch.wait() == 1, launch.output()
        launch.assert_nothing_left()
        printed = launch.output()
    assert "[1/2] top_k-2: FAILED with exit code 1" in printed
    assert "RuntimeError: no luck with two" in printed
    assert "[2/2] top_k-1: eval/loss" in printed
    finished, failed = json.loads((out / "results.json").read_text())["trials"]
    assert (finished["name"], finished["state"]) == ("top_k-1", "finished")
    assert (failed["name"], failed["state"]) == ("top_k-2", "failed")
    text = (out / "sweep.md").read_text()
    assert "1 of 2 trials finished" in text
    assert "no luck with two" in text
    assert "Trials ran at once" in text


def test_the_command_of_a_wandb_agent(flags: list[str], tmp_path: Path) -> None:
    """As W&B's client builds it, in the environment that its agent sets; without its server, so offline."""
    from wandb.sdk.launch.sweeps import utils
    from wandb.sdk.lib import config_util

    path = tmp_path / "sweep.yaml"
    variants = ["--variant", "moe:", "--variant", "dense, equal FLOPs: moe.enabled=false"]
    offline = ["--telemetry.wandb", "offline", "--max_steps", "3"]
    cli.main(["sweep", RECIPE, "--grid", "moe.top_k=1,2", *variants, *flags, *offline, "--wandb_sweep", str(path)])
    args = {"moe.top_k": {"value": 1}, "variant": {"value": "dense, equal FLOPs"}}
    config_util.save_config_file_from_dict(str(tmp_path / "parameters.yaml"), args)
    words = []
    for word in utils.create_sweep_command(yaml.safe_load(path.read_text())["command"]):
        words += utils.create_sweep_command_args({"args": args})["args"] if word == "${args}" else [word]
    assert words[:2] == ["moe-scale", "sweep"]
    environ = {
        "WANDB_SWEEP_ID": "sw33p", "WANDB_RUN_ID": "r1d2", "WANDB_PROJECT": "of-the-agent", "OMP_NUM_THREADS": "1",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "parameters.yaml"), "PYTHONPATH": str(REPO),
    }  # fmt: skip
    done = subprocess.run(
        [*TOOL, *words[2:]], cwd=REPO, env=os.environ | environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B is off" not in done.stderr
    assert "Ignoring" not in done.stdout + done.stderr, "the sink leaves run and project to the agent"
    run = tmp_path / "sweep" / "trials" / "r1d2"
    assert lines_of(run) > 2
    (journal,) = run.glob("wandb/offline-run-*-r1d2/run-r1d2.wandb")
    written = journal.read_bytes()
    assert b"sw33p" in written
    assert b"of-the-agent" in written
    assert b"eval/loss" in written
    assert shutil.which("wandb", path=str(Path(sys.executable).parent)), "the agent is a command of this environment"
