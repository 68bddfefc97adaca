"""Beginning with the weights of an earlier run: what is taken, what is drawn, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import MOMENTS, WEIGHT, Index
from moe_scale.checkpoint.writer import Piece, join, write_part
from moe_scale.config import LoRAConfig, MultimodalConfig
from moe_scale.errors import ConfigError
from moe_scale.models.lora import add_adapters
from moe_scale.models.text_image import TextImageModel
from moe_scale.settings import to_dict
from moe_scale.train.pretrained import begin_with, pretrained_problems
from tests.unit.models.test_text_image import GLUE, MOE, SMALL, VQA

KIND = "text-image"


def write_run(folder: Path, model: TextImageModel) -> Path:
    """A run that was saved after some steps."""
    partial = folders.begin(target := folders.checkpoints_of(folder) / folders.name_of(5))
    pieces = [
        Piece(name, tuple(p.shape), state, 0, p.detach().reshape(-1).clone())
        for name, p in model.named_parameters()
        for state in (WEIGHT, *MOMENTS)
    ]
    tensors, sizes, ranks = join([write_part(partial, pieces, {"data": {}, "rng": {}}, rank=0, world_size=1)], partial)
    settings = to_dict(MultimodalConfig(model=model.config, moe=model.moe_config))
    counted = {"name": "adamw", "steps": 5, "schedule_steps": 5, "skipped": 0, "loss_scaler": None, "tables": {}}
    Index(
        tensors=tensors, sizes=sizes, ranks=ranks, kind=KIND, settings=settings, layout={}, step=5, tokens=1, scores={},
        optimizer=counted,
    ).write(partial)  # fmt: skip
    folders.finish(target)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), TextImageModel(SMALL, MOE, seed=11))


@pytest.mark.parametrize("goal", [SMALL, VQA, GLUE], ids=["retrieval", "vqa", "glue"])
def test_what_both_have_is_taken_and_the_rest_is_drawn(run: Path, goal: object) -> None:
    model, earlier = (TextImageModel(goal, MOE, seed=seed) for seed in (2, 11))
    drawn = {name: p.clone() for name, p in model.named_parameters()}
    assert pretrained_problems("model.pretrained", str(run), KIND, model) == []
    begin_with("model.pretrained", str(run), KIND, model)
    expected = dict(earlier.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, drawn[name] if name.startswith("head.") else expected[name])


def test_adapters_are_added_to_what_was_taken(run: Path) -> None:
    model = TextImageModel(SMALL, MOE, seed=2)
    begin_with("model.pretrained", str(run), KIND, model)
    add_adapters(model, LoRAConfig(rank=2, targets=("q_proj",)))
    begin_with("model.pretrained", str(run), KIND, model)  # adapters are in no checkpoint, and stay


def test_what_does_not_fit_is_told_before_anything_is_changed(run: Path, tmp_path: Path) -> None:
    wide = TextImageModel(replace(SMALL, text_width=32), MOE, seed=2)
    before = {name: p.clone() for name, p in wide.named_parameters()}
    problems = pretrained_problems("model.pretrained", str(run), KIND, wide)
    assert {problem.where for problem in problems} == {"model.pretrained"}
    assert "text.embedding.weight is (300, 16)" in str(problems[0])
    with pytest.raises(ConfigError):
        begin_with("model.pretrained", str(run), KIND, wide)
    torch.testing.assert_close(dict(wide.named_parameters()), before)
    small = TextImageModel(SMALL, MOE)
    [problem] = pretrained_problems("model.pretrained", str(run), "decoder", small)
    assert "kind text-image" in str(problem)
    [problem] = pretrained_problems("model.pretrained", str(tmp_path / "none"), KIND, small)
    assert problem.where == "model.pretrained"
    add_adapters(small, LoRAConfig(rank=2, targets=("q_proj",)))
    adapted = write_run(tmp_path / "adapted", small)
    [problem] = pretrained_problems("model.pretrained", str(adapted), KIND, TextImageModel(SMALL, MOE))
    assert "trained with adapters" in str(problem)


def test_a_damaged_checkpoint_changes_nothing(run: Path, tmp_path: Path) -> None:
    damaged = write_run(tmp_path, TextImageModel(SMALL, MOE, seed=11))
    [file] = folders.find_checkpoint(damaged).glob("model-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    model = TextImageModel(SMALL, MOE, seed=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="model-00001"):
        begin_with("model.pretrained", str(damaged), KIND, model)
    torch.testing.assert_close(dict(model.named_parameters()), before)
