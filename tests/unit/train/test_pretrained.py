"""Beginning with the weights of an earlier run: what is taken, what is drawn, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTModel

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.index import MOMENTS, WEIGHT, Index
from moe_scale.checkpoint.writer import Piece, join, write_part
from moe_scale.config import ImageTextDataConfig, LoRAConfig, MultimodalConfig
from moe_scale.errors import ConfigError
from moe_scale.models.lora import add_adapters
from moe_scale.models.text_image import TextImageModel
from moe_scale.settings import to_dict
from moe_scale.train.multimodal import MultimodalTask
from moe_scale.train.multimodal_model import HEAD, model_problems, model_remarks
from moe_scale.train.pretrained import begin_with, pretrained_problems, pretrained_remarks
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
    [problem] = pretrained_problems("model.pretrained", str(run), KIND, wide, settings_of(wide))
    assert problem.where == "model.pretrained"
    assert "text.embedding.weight is (300, 16)" in problem.what
    assert "more do not fit" in problem.what
    assert problem.allowed == "choose that run's model settings: model.text_width 16"
    with pytest.raises(ConfigError):
        begin_with("model.pretrained", str(run), KIND, wide)
    torch.testing.assert_close(dict(wide.named_parameters()), before)
    small = TextImageModel(SMALL, MOE)
    [problem] = pretrained_problems("model.pretrained", str(run), "decoder", small)
    assert "kind text-image" in str(problem)
    [problem] = pretrained_problems("model.pretrained", str(tmp_path / "none"), KIND, small)
    assert problem.where == "model.pretrained"
    with pytest.raises(ConfigError, match=r"^model.pretrained: .*none: holds no checkpoint"):
        begin_with("model.pretrained", str(tmp_path / "none"), KIND, small)
    add_adapters(small, LoRAConfig(rank=2, targets=("q_proj",)))
    adapted = write_run(tmp_path / "adapted", small)
    [problem] = pretrained_problems("model.pretrained", str(adapted), KIND, TextImageModel(SMALL, MOE))
    assert "trained with adapters" in str(problem)


def settings_of(model: TextImageModel, source: str = "sample") -> dict[str, Any]:
    config = MultimodalConfig(model=model.config, moe=model.moe_config)
    return to_dict(config) | {"data": {"source": source}}


def test_a_head_of_other_classes_is_drawn_and_told(tmp_path: Path) -> None:
    """As from MNLI's three classes to RTE's two, which no setting of the model could make equal."""
    earlier = TextImageModel(GLUE, MOE, seed=11)
    run, model = write_run(tmp_path, earlier), TextImageModel(replace(GLUE, num_outputs=2), MOE, seed=2)
    drawn, expected = ({name: p.clone() for name, p in of.named_parameters()} for of in (model, earlier))
    assert pretrained_problems("model.pretrained", str(run), KIND, model, settings_of(model), head=HEAD) == []
    begin_with("model.pretrained", str(run), KIND, model, head=HEAD)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, drawn[name] if name.startswith("head.") else expected[name])
    told = pretrained_remarks(str(run), model, settings_of(model), head=HEAD)
    assert "model.pretrained: of its tensors and the model's 2 are drawn: head.bias, head.weight" in told
    assert not any("taken over" in remark for remark in told)
    [problem] = pretrained_problems("model.pretrained", str(run), KIND, model)
    assert problem.what.startswith("head."), "of a model whose head is no matter of the data"


def test_a_head_of_other_data_is_told(tmp_path: Path) -> None:
    model = TextImageModel(GLUE, MOE, seed=11)
    run = write_run(tmp_path, model)
    [remark] = pretrained_remarks(str(run), model, settings_of(model, "glue/mnli"), head=HEAD)
    assert remark.endswith("its head is taken over, whose outputs are the classes of data.source sample")
    assert pretrained_remarks(str(run), model, settings_of(model), head=HEAD) == []


def test_what_a_run_takes_otherwise_is_told_when_it_starts(run: Path, tmp_path: Path) -> None:
    """Words of another kind have no effect, and colours that are scaled otherwise mean something else."""
    data = {"tokenizer": "bpe", "std": (0.25, 0.5, 0.5), "image_size": SMALL.image_size}
    config = MultimodalConfig(model=replace(SMALL, pretrained=str(run)), moe=MOE, data=ImageTextDataConfig(**data))
    assert model_remarks(config) == [
        "data.tokenizer: bpe has no effect, as the words are those of model.pretrained",
        "model.pretrained: data.std was 0.5 0.5 0.5 and is 0.25 0.5 0.5",
    ]
    assert model_remarks(replace(config, model=SMALL)) == []
    assert MultimodalTask(config).remarks() == model_remarks(config)


def test_two_image_encoders_to_begin_with_are_refused(run: Path, tmp_path: Path) -> None:
    vit = {"hidden_size": SMALL.image_width, "num_hidden_layers": SMALL.image_layers,
           "num_attention_heads": SMALL.image_heads, "intermediate_size": SMALL.image.hidden}  # fmt: skip
    sizes = {"patch_size": SMALL.patch_size, "image_size": SMALL.image_size, "layer_norm_eps": SMALL.image_norm_eps}
    ViTModel(ViTConfig(**vit, **sizes), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    model = replace(SMALL, pretrained=str(run), vit_weights=str(tmp_path / "vit"))
    data = ImageTextDataConfig(image_size=SMALL.image_size)
    (run / "tokenizer.model").touch()
    [problem] = model_problems(MultimodalConfig(model=model, moe=MOE, data=data))
    assert problem.where == "model.vit_weights"
    assert "which would replace it" in problem.what


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
