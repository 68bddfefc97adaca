"""The recipe ``multimodal``: its scales and sizes, what it refuses, and runs that build on each other."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import ViTConfig, ViTModel

import moe_scale
from moe_scale.config import SCALES
from moe_scale.errors import ConfigError
from moe_scale.models.lora import adapters, merge_adapters
from moe_scale.models.multimodal_counts import num_active_params, num_params
from moe_scale.parallel import device as devices
from moe_scale.parallel import launch as launches
from moe_scale.train.recipe import prepare_job
from recipes.multimodal import RECIPE
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import records
from tests.recipes.test_lm_16l import RANKS_OF_SCALE
from tests.unit.data.images.conftest import folder_of_pictures

WORKER = str(REPO / "tests" / "recipes" / "multimodal_runs.py")
TINY = """
max_steps: 4
model: {vocab_size: 300, text_layers: 1, text_width: 16, text_heads: 2, patch_size: 8, image_layers: 1,
  image_width: 24, image_heads: 2, image_hidden: 40, fusion_layers: 1, fusion_width: 16, fusion_heads: 2, embed_size: 8}
moe: {num_experts: 4, intermediate_size: 16}
optim: {warmup_steps: 1, lr: 0.01}
data: {batch_examples: 4, image_size: 16, num_workers: 0, valid_fraction: 0.1, test_fraction: 0.2}
eval: {every: 2}
telemetry: {every: 1, tensorboard: false, wandb: "off"}
"""
DS_JSON = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_passes_the_checks(scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world_size, per_node = RANKS_OF_SCALE[scale]
    kind = "cpu" if scale == "cpu" else "cuda"
    monkeypatch.setattr(launches, "detect", lambda: launches.Launch(0, world_size, 0, per_node, "env"))
    monkeypatch.setattr(devices, "detect", lambda: devices.Device(kind, "a device", bf16=True, fp16=True))
    job = prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run")])
    assert job.config.scale == scale
    assert job.plan.stage == 3
    assert any("by heart" in remark for remark in job.config.remarks()) == (scale != "cpu")
    total, active = (count(job.config.model, job.config.moe).total / 1e9 for count in (num_params, num_active_params))
    expected = {"1gpu": (0.25, 0.175), "1node": (1.3, 0.6), "multinode": (13.0, 1.6)}
    if scale in expected:
        assert (total, active) == pytest.approx(expected[scale], rel=0.05)


@pytest.mark.parametrize(
    ("flags", "where", "what"),
    [
        (["--lora.rank", "2", "--lora.targets", "qproj"], "lora.targets", "no linear layer of this model"),
        (["--model.vit_weights", "nowhere"], "model.vit_weights", "nowhere has no config.json"),
        (["--model.pretrained", "nowhere"], "model.pretrained", "nowhere"),
        (["--model.patch_size", "7"], "model.patch_size", "does not divide"),
        (["--data.source", "nowhere"], "data.source", "does not exist"),
        (["--moe.backend", "deepspeed", "--moe.ep_size", "2", "--moe.top_k", "1"], "moe.backend", "one size"),
        (["--early_stopping.metric", "eval/accuracy"], "early_stopping.metric", "eval/image_to_text_r1"),
    ],
)
def test_what_it_refuses(flags: list[str], where: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        prepare_job(RECIPE, ["--output_dir", str(tmp_path / "run"), *flags])
    assert any(problem.where == where and what in str(problem) for problem in error.value.problems), error.value


def pictures_with_words(folder: Path, count: int) -> Path:
    """Pictures with captions of enough words for a vocabulary; returns their metadata.jsonl."""
    path, draw = folder_of_pictures(folder, count), random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(3, 8))) for _ in range(90)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["caption"] = {code: " ".join(draw.choices(words, k=8)) for code in line["caption"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_vqa(folder: Path, count: int) -> list[str]:
    """Questions about the first pictures of ``folder_of_pictures``. Returns the flags."""
    questions, answers = [], []
    for number in range(count):
        questions.append({"image_id": number, "question_id": number, "question": f"is {number} odd ?"})
        answer = ["no", "yes"][number % 2]
        people = [{"answer": answer}] * 3
        answers.append({"question_id": number, "multiple_choice_answer": answer, "answers": people})
    (folder / "q.json").write_text(json.dumps({"questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": answers}))
    files = ["--data.source", str(folder / "q.json"), "--data.answers", str(folder / "a.json")]
    return [*files, "--data.format", "vqa", "--data.num_answers", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks: a ViT's weights for retrieval, interrupted and continued; adapters beside it; VQA and GLUE."""
    folder = tmp_path_factory.mktemp("multimodal")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "ds.json").write_text(json.dumps(DS_JSON))
    source = ["--data.source", str(pictures_with_words(folder / "pictures", 40)), "--data.unseen_languages", "de"]
    vqa = write_vqa(folder / "pictures", 40)
    torch.manual_seed(0)
    vit = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    ViTModel(ViTConfig(**vit, patch_size=8, image_size=16), add_pooling_layer=False).save_pretrained(folder / "vit")

    def argv(name: str, *flags: str) -> list[str]:
        files = ["--config", str(folder / "tiny.yaml"), "--deepspeed_config", str(folder / "ds.json")]
        return [*files, "--output_dir", str(folder / name), "--data.cache_dir", str(folder / "cache"), *flags]

    begun = [*source, "--model.vit_weights", str(folder / "vit"), "--moe.ep_size", "2"]
    from_it = ["--model.pretrained", str(folder / "resumed")]
    lora = ["--lora.rank", "2", "--lora.targets", "q_proj", "query", "router"]
    frozen_vit = ["--lora.rank", "2", "--lora.targets", "*_proj", "--model.vit_weights", str(folder / "vit")]
    cases = [
        argv("whole", *begun),
        argv("resumed", *begun, "--max_steps", "2", "--optim.schedule", "constant"),
        argv("resumed", *begun, "--resume", "must", "--optim.schedule", "constant"),
        argv("straight", *begun, "--optim.schedule", "constant"),
        argv("lora", *source, *from_it, *lora, "--max_steps", "2", "--eval.at_start", "true"),
        argv("lora", *source, *from_it, *lora, "--resume", "must"),
        argv("vit-lora", *source, *frozen_vit),
        argv("vqa", *vqa, *from_it, *lora, "--lora.also_trained", "head"),
        argv("rte", "--data.source", "glue/rte", *from_it),
        argv("stsb", "--data.source", "glue/stsb", "--moe.router", "noisy", *from_it),
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(2, [WORKER, str(folder / "cases.json")], timeout=280)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(moe_scale.load_model(run).named_parameters())


def scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "test_scores.json").read_text())


def test_a_run_leaves_its_scores_in_each_language(runs: Path) -> None:
    found = scores(runs / "whole")["test"]
    assert {code: one["trained"] for code, one in found.items()} == {"en": True, "de": False}
    for one in found.values():
        assert one["image_to_text"]["queries"] == one["text_to_image"]["candidates"] == 8
    logged = records(runs / "whole")
    assert all(math.isfinite(r["loss/contrastive"] + r["loss/matching"]) for r in logged if "loss" in r)
    assert {"eval/image_to_text_r1", "eval/text_to_image_r1/de"} <= logged[-1].keys()
    assert not (runs / "whole" / "adapters").exists()


def test_a_run_goes_on_where_it_was(runs: Path) -> None:
    curves = [[(r["step"], r["loss"]) for r in records(runs / name) if "loss" in r] for name in ("resumed", "straight")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 4
    torch.testing.assert_close(weights(runs / "resumed"), weights(runs / "straight"), rtol=0, atol=0)


def test_adapters_leave_the_run_that_they_build_on_as_it_was(runs: Path) -> None:
    """To the bit, through sharding over two ranks, two checkpoints and a resume."""
    base, adapted = weights(runs / "resumed"), weights(runs / "lora")
    added = adapted.keys() - base.keys()
    assert base.keys() <= adapted.keys()
    assert added
    assert all(".lora_" in name for name in added)
    assert all(torch.equal(adapted[name], base[name]) for name in base)
    assert any(adapted[name].abs().sum() for name in added if "lora_B" in name)
    model = moe_scale.load_model(runs / "lora")
    assert len(adapters(model)) == 1 + 3 + 2  # q_proj; query of the text and twice of the fusion; routers
    with pytest.raises(ConfigError, match="trained with adapters"):
        prepare_job(RECIPE, ["--model.pretrained", str(runs / "lora"), "--output_dir", str(runs / "none")])


def test_adapters_begin_as_the_model_that_they_stand_beside(runs: Path) -> None:
    before, ended = records(runs / "lora")[0], [r for r in records(runs / "resumed") if "eval/loss" in r][-1]
    assert (before["step"], before["tokens"], ended["step"]) == (0, 0, 4)
    scored = [name for name in before if name.startswith("eval/")]
    assert len(scored) == 7
    assert {name: before[name] for name in scored} == pytest.approx({name: ended[name] for name in scored}, rel=1e-5)
    assert [r["step"] for r in records(runs / "lora") if "eval/loss" in r] == [0, 2, 4], "and not when it goes on"


def test_adapters_go_on_as_they_were_begun(runs: Path) -> None:
    begun = json.loads((runs / "cases.json").read_text())[5]
    assert begun[-1] == "must"
    with pytest.raises(ConfigError, match=r"lora.alpha: .* was saved with 16.0, this run has 3.0"):
        prepare_job(RECIPE, [*begun, "--lora.alpha", "3", "--max_steps", "9"])


def test_peft_reads_the_adapters_of_a_runs_image_encoder(runs: Path) -> None:
    """Onto the very ViT of Hugging Face that the run began with."""
    model = moe_scale.load_model(runs / "vit-lora")
    theirs = ViTModel.from_pretrained(runs / "vit", add_pooling_layer=False)
    adapted = peft.PeftModel.from_pretrained(theirs, runs / "vit-lora" / "adapters_vit").eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model.image(images)
    torch.testing.assert_close(adapted(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    plain = ViTModel.from_pretrained(runs / "vit", add_pooling_layer=False).eval()
    assert (plain(images).last_hidden_state - expected).abs().max() > 1e-3
    merge_adapters(model)
    torch.testing.assert_close(model.image(images), expected, rtol=1e-5, atol=1e-5)


def test_questions_about_images(runs: Path) -> None:
    base, tuned = weights(runs / "resumed"), weights(runs / "vqa")
    assert all(torch.equal(tuned[name], base[name]) for name in tuned.keys() & base.keys())
    assert tuned["head.bias"].abs().sum() > 0
    assert 0 <= scores(runs / "vqa")["test"]["accuracy"] <= 1
    saved = json.loads((runs / "vqa" / "adapters" / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["head"]


@pytest.mark.parametrize(("name", "metrics"), [("rte", {"accuracy"}), ("stsb", {"pearson", "spearman"})])
def test_tasks_of_glue(runs: Path, name: str, metrics: set[str]) -> None:
    found = scores(runs / name)["test"]
    assert found.keys() == {"examples", "loss", "score"} | metrics
    assert found["examples"] == 21
    assert f"eval/{min(metrics)}" in records(runs / name)[-1]
    kept = {name.split(".")[0] for name in weights(runs / name)}
    assert kept == {"text", "head"}
    words = [(runs / run / "tokenizer.model").read_bytes() for run in (name, "resumed")]
    assert words[0] == words[1], "tokens mean what they meant in the run that it begins with"
