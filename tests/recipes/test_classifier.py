"""The recipe ``classifier``: its scales, what it refuses, what a run leaves, and that the best weights are the last."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_scale
from moe_scale.config import SCALES, ClassifierConfig
from moe_scale.data.examples.batches import eval_batches
from moe_scale.data.examples.prepare import prepare_examples
from moe_scale.errors import ConfigError
from moe_scale.evaluate.classification import Predictions, predict, score_predictions
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.train.recipe import prepare_job
from recipes.classifier import RECIPE
from tests.curves import TINY_CLASSIFIER, write_moods
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import records
from tests.recipes.test_lm_16l import RANKS_OF_SCALE

TRAIN_CASES = str(REPO / "tests" / "distributed" / "train_cases.py")
SEED_FIELDS = {
    "input_size", "hidden_size", "output_size", "num_experts", "k", "num_layers", "dropout", "temperature",
}  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_passes_the_checks(scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world_size, per_node = RANKS_OF_SCALE[scale]
    kind = "cpu" if scale == "cpu" else "cuda"
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, world_size, 0, per_node, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device(kind, "a device", bf16=True, fp16=True))
    job = prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run")])
    assert job.config.scale == scale
    assert job.plan.stage == 3


def test_the_layer_has_the_models_own_settings(tmp_path: Path) -> None:
    flags = ["--model.num_experts", "6", "--model.k", "3", "--model.temperature", "0.5", "--model.hidden_size", "64"]
    config = prepare_job(RECIPE, [*flags, "--moe.ep_size", "1", "--output_dir", str(tmp_path / "run")]).config
    assert isinstance(config, ClassifierConfig)
    assert set(vars(config.model)) >= SEED_FIELDS
    moe = config.moe
    assert (moe.num_experts, moe.top_k, moe.router_temperature, moe.intermediate_size) == (6, 3, 0.5, 64)


FILE = "text,label\na,0\nb,1\n"


@pytest.mark.parametrize(
    ("flags", "where", "what"),
    [
        (["--moe.num_experts", "4"], "--moe.num_experts", "did you mean --model.num_experts?"),
        (["--model.k", "9"], "model.k", "9 > model.num_experts = 8; choose 1 to 8"),
        (["--model.num_experts", "9", "--moe.ep_size", "2"], "moe.ep_size", "does not divide model.num_experts = 9"),
        (["--model.temperature", "2", "--moe.backend", "autoep"], "model.temperature", "use model.temperature 1.0"),
        (["--model.num_heads", "7"], "model.num_heads", "does not divide model.hidden_size"),
        (["--model.output_size", "1"], "model.output_size", "greater than or equal to 2"),
        (["--model.positions", "learned", "--model.max_positions", "50"], "model.max_positions", "choose at least"),
        (["--moe.every", "3"], "moe.every", "no layer is sparse"),
        (["--model.embeddings", "encoder"], "data.tokenizer", "choose encoder"),
        (["--model.embeddings", "encoder"], "model.input_size", "choose 384"),
        (["--data.tokenizer", "encoder"], "model.vocab_size", "choose 30522"),
        (["--data.source", "synthetic", "--model.embeddings", "encoder"], "model.embeddings", "has no tokens"),
        (["--data.source", "synthetic", "--moe.router", "hash"], "moe.router", "features have no token ids"),
        (["--data.source", "synthetic", "--data.test_fraction", "0"], "data.test_fraction", "held-out examples of its"),
        (["--data.source", "synthetic", "--data.max_len", "3"], "data.max_len", "choose 4 at least"),
        (["--data.source", "nowhere"], "data.source", "choose sample, glue/sst2, synthetic"),
        (["--data.source", "glue/stsb"], "data.source", "no classification task"),
        (["--data.heldout", "a.csv"], "data.heldout", "has held-out examples of its own"),
        (["--data.label_field", "y"], "data.label_field", "has fields of its own"),
        (["--data.text_fields", "a", "b"], "data.text_fields", "has fields of its own"),
        (["--data.features_field", "x"], "data.features_field", "a file of JSON lines"),
        (["--data.valid_fraction", "0"], "data.valid_fraction", "choose more than 0"),
        (["--data.source", "synthetic", "--data.valid_fraction", "0.95"], "data.test_fraction", "nothing to train on"),
        (["--early_stopping.metric", "eval/bleu"], "early_stopping.metric", "eval/accuracy"),
        (["--eval.every", "0"], "early_stopping.metric", "set eval.every"),
    ],
)
def test_what_is_refused(flags: list[str], where: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(RECIPE, [*flags, "--output_dir", str(tmp_path / "run")])
    assert any(p.where == where and what in str(p) for p in refused.value.problems), refused.value
    assert "moe.top_k" not in str(refused.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all that one process can train in a short time."""
    made = tmp_path_factory.mktemp("classifier")
    write_moods(made / "moods.csv")
    write_moods(made / "first.csv", 150)  # its sentences are the first of the others
    (made / "tiny.yaml").write_text(TINY_CLASSIFIER.replace("max_steps: 20", "max_steps: 6"))
    (made / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}))
    synthetic = ["--data.synthetic_examples", "200", "--model.output_size", "3"]
    dropout = ["--model.dropout", "0.2", "--model.position_dropout", "0.1", "--optim.schedule", "constant"]
    stop = ["--early_stopping.metric", "eval/loss", "--early_stopping.patience", "2", "--eval.every", "1"]
    cases = {
        "whole": ["--eval.every", "3", "--telemetry.tensorboard", "true", *dropout],
        # So high a rate that the first weights are the best.
        "stopped": [*stop, "--optim.lr", "1", "--optim.schedule", "constant", "--max_steps", "30"],
        "half": [*dropout, "--eval.every", "3", "--max_steps", "3"],
        "half again": [*dropout, "--eval.every", "3", "--resume", "must"],
        "synthetic": ["--data.source", "synthetic", *synthetic],
        "control": ["--data.source", "synthetic-random-labels", *synthetic, "--eval.baseline", "false"],
        "heldout": ["--data.heldout", str(made / "first.csv"), "--model.pooling", "attention", "--moe.router", "hash"],
        "choice": ["--moe.router", "expert_choice", "--moe.dispatch", "capacity", "--moe.every", "2"],
        "dense": ["--moe.enabled", "false", "--eval.max_examples", "10"],
        "bf16": ["--deepspeed_override", "bf16.enabled=true", "--moe.router", "sigmoid"],
        "encoder": ["--data.tokenizer", "encoder", "--model.embeddings", "encoder", "--model.input_size", "384",
                    "--model.vocab_size", "30522", "--max_steps", "3", "--optim.name", "adamw8bit"],
    }  # fmt: skip
    argvs = [flags_of(made, name.removesuffix(" again"), flags) for name, flags in cases.items()]
    (made / "cases.json").write_text(json.dumps(argvs))
    printed = run_ranks(1, [TRAIN_CASES, str(made / "cases.json"), "classifier"])
    assert "Warning" not in printed, "a user should read no noise"
    (made / "printed.txt").write_text(printed)
    return made


def flags_of(made: Path, name: str, flags: list[str]) -> list[str]:
    return [
        "--config", str(made / "tiny.yaml"), "--deepspeed_config", str(made / "ds.json"), "--data.source",
        str(made / "moods.csv"), "--data.cache_dir", str(made / "cache"), "--output_dir", str(made / name), *flags,
    ]  # fmt: skip


def predictions_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]


def test_what_a_run_leaves(folder: Path) -> None:
    runs = [path for path in folder.iterdir() if (path / "metrics.jsonl").is_file()]
    assert len(runs) == 10
    for run in runs:
        logged = [record for record in records(run) if "loss" in record]
        assert all(math.isfinite(record["loss"]) for record in logged), run.name
        for picture in ("confusion", "calibration"):
            assert (run / f"{picture}.png").stat().st_size > 5000
        assert (run / "tokenizer.model").is_file() == (run.name not in ("synthetic", "control", "encoder"))
    assert (folder / "encoder" / "tokenizer.json").is_file()
    scores = [record for record in records(folder / "whole") if "eval/loss" in record]
    assert [record["step"] for record in scores] == [3, 6]
    assert {"eval/accuracy", "eval/f1", "eval/ece"} <= scores[-1].keys()
    assert scores[-1]["eval/examples"] == 40
    first = records(folder / "whole")[0]
    parts = {"embedding", "projections", "attention", "router", "experts", "norms"}
    assert {key.removeprefix("grad_norm/") for key in first if key.startswith("grad_norm/")} == parts
    assert {"aux_loss", "z_loss", "router/entropy"} <= first.keys()
    assert list((folder / "whole" / "tensorboard").iterdir())
    assert records(folder / "dense")[-1]["eval/examples"] == 10
    assert "grad_norm/ffn" in records(folder / "dense")[0]
    assert len(records(folder / "choice")[0]["router/entropy"]) == 1


def test_scores_are_those_of_the_predictions_kept(folder: Path) -> None:
    printed = (folder / "printed.txt").read_text()
    for name in ("whole", "synthetic", "heldout"):
        stored, kept = json.loads((folder / name / "test_scores.json").read_text()), predictions_of(folder / name)
        given = Predictions(
            np.arange(len(kept)), np.array([k["label"] for k in kept]), np.array([k["probabilities"] for k in kept])
        )
        assert stored["model"] == score_predictions(given).record()
        assert [k["predicted"] for k in kept] == given.predicted.tolist()
        accuracy = stored["model"]["accuracy"]
        assert f"{accuracy:.1%} ± {stored['model']['standard_error']:.1%} of {len(kept)} held-out" in printed
        assert f"{stored['baseline']['name']}: accuracy {stored['baseline']['accuracy']:.1%}" in printed
    assert json.loads((folder / "control" / "test_scores.json").read_text())["baseline"] is None
    chance = json.loads((folder / "control" / "test_scores.json").read_text())["chance"]
    assert chance["even"] == pytest.approx(1 / 3)
    assert chance["standard_error"] == pytest.approx(math.sqrt(2 / 9 / 20))
    assert not any("text" in line for line in predictions_of(folder / "synthetic"))


def test_what_is_held_out_was_not_trained_on_and_is_counted(folder: Path) -> None:
    printed = (folder / "printed.txt").read_text()
    assert "left out: 150 training examples that are held out as well: not trained on" in printed
    assert {line["text"] for line in predictions_of(folder / "heldout")} == {
        line.rpartition(",")[0] for line in (folder / "first.csv").read_text().splitlines()[1:]
    }


def test_the_weights_at_the_end_are_the_best_ones(folder: Path) -> None:
    run = folder / "stopped"
    scores = {r["step"]: r["eval/loss"] for r in records(run) if "eval/loss" in r}
    best = min(scores, key=lambda step: scores[step])
    assert max(scores) == best + 2 < 30
    assert (run / "checkpoints" / "best").resolve().name == f"step_{best:08d}"
    config = prepare_job(RECIPE, [*flags_of(folder, "none", [])]).config
    assert isinstance(config, ClassifierConfig)
    split = prepare_examples(config).split("test")
    expected = np.array([line["probabilities"] for line in predictions_of(run)])
    distance = {}
    for name in ("best", "latest"):
        model = moe_scale.load_model(run / "checkpoints" / name)
        found = predict(model, eval_batches(split, batch=4, rank=0, world_size=1), torch.device("cpu"))
        distance[name] = np.abs(found.probs_NC - expected).max()
    assert distance["best"] < 1e-5 < distance["latest"], distance


def test_resuming_gives_the_same_to_the_bit(folder: Path) -> None:
    figures = [
        [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in records(folder / name) if "loss" in r]
        for name in ("whole", "half")
    ]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 6
    assert predictions_of(folder / "whole") == predictions_of(folder / "half")


@pytest.mark.parametrize(("name", "kind"), [("bf16", True), ("synthetic", False)])
def test_a_run_opens_as_a_model(name: str, kind: bool, folder: Path) -> None:
    model = moe_scale.load_model(folder / name)
    assert type(model).__name__ == "Classifier"
    assert (model.embedding is not None) == kind
    assert not model.training


def test_bad_data_ends_a_run_with_one_message(folder: Path, tmp_path: Path) -> None:
    """As a user starts it. The labels are read when the process group is up."""
    (tmp_path / "bad.csv").write_text("text,label\ngood,pos\nbad,neg\n")
    argv = flags_of(folder, "bad", ["--data.source", str(tmp_path / "bad.csv")])
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, str(REPO / "recipes" / "classifier.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: 1 problem with the settings" in done.stderr
    assert (
        "data.label_field: 2 labels are no whole numbers from 0 [bad.csv, line 2: 'pos'; bad.csv, line 3: 'neg']"
        in (done.stderr)
    )
    assert not (folder / "bad").exists()
