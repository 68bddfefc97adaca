"""The model of texts and images: what its losses are of, what rows count, and that every part learns."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_scale.config import ImageTextDataConfig, MoEConfig, MultimodalConfig, MultimodalModelConfig
from moe_scale.data.images.batches import ImageTextBatch
from moe_scale.models.build import build_model
from moe_scale.models.text_image import MultimodalOutput, TextImageModel
from moe_scale.settings import to_dict

SMALL = MultimodalModelConfig(
    goal="retrieval", inputs="image_text", vocab_size=300, text_layers=2, text_width=16, text_heads=2, image_size=16,
    patch_size=8, image_layers=2, image_width=24, image_heads=2, image_norm_eps=1e-6, fusion_layers=2, fusion_width=16,
    fusion_heads=2, embed_size=12, dropout=0.0,
)  # fmt: skip
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=16)
GLUE = replace(SMALL, goal="classification", inputs="text", num_outputs=3)
STSB = replace(GLUE, goal="regression", num_outputs=1)
VQA = replace(SMALL, goal="classification", num_outputs=5)


def build(model: MultimodalModelConfig = SMALL, moe: MoEConfig = MOE) -> TextImageModel:
    return TextImageModel(model, moe, seed=3).eval()


def batch(rows: int = 6, *, images: bool = True, labels: Tensor | None = None, pairs: bool = False) -> ImageTextBatch:
    draw = torch.Generator().manual_seed(0)
    valid_BS = torch.arange(7) < torch.randint(2, 8, (rows, 1), generator=draw)
    ids_BS = torch.randint(5, 300, (rows, 7), generator=draw) * valid_BS
    ids_BS[:, 0] = 1
    return ImageTextBatch(
        torch.randn(rows, 3, 16, 16, generator=draw) if images else None,
        ids_BS,
        valid_BS,
        (torch.arange(7) >= 3).long().expand(rows, 7) if pairs else None,
        labels,
        torch.arange(rows),
        torch.ones(rows, dtype=torch.bool),
    )


def test_retrieval_adds_up() -> None:
    model = build(replace(SMALL, contrastive_weight=2.0, matching_weight=0.5), replace(MOE, aux_loss_weight=0.5))
    out = model(*batch())
    torch.testing.assert_close(out.image_BE.norm(dim=1), torch.ones(6))
    logits = out.scale * out.image_BE @ out.text_BE.t()
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.t(), torch.arange(6))) / 2
    torch.testing.assert_close(out.parts["contrastive"], expected.detach())
    torch.testing.assert_close(out.lm_loss, 2 * out.parts["contrastive"] + 0.5 * out.parts["matching"])
    router = 0.5 * out.moe.aux_loss.sum() + 0.001 * out.moe.z_loss.sum()
    torch.testing.assert_close(out.loss, out.lm_loss + router)
    assert not out.lm_loss.requires_grad


def test_the_mean_stands_for_tokens_and_patches_that_are_there() -> None:
    model, given = build(replace(SMALL, pooling="mean")), batch()
    out = model(*given)
    text_BSD, image_BPD = model.text(given.ids_BS, given.valid_BS, None)[0], model.image(given.images_BCHW)
    for row in range(6):
        text_D = text_BSD[row, : int(given.valid_BS[row].sum())].mean(dim=0)
        torch.testing.assert_close(out.text_BE[row], F.normalize(model.project_text(text_D), dim=0))
        image_D = image_BPD[row, 1:].mean(dim=0)
        torch.testing.assert_close(out.image_BE[row], F.normalize(model.project_image(image_D), dim=0))
    nothing = model(*given._replace(present_B=torch.zeros(6, dtype=torch.bool)))
    assert all(torch.isfinite(t).all() for t in (nothing.loss, nothing.text_BE, nothing.image_BE))


def test_matching_is_of_each_pair_and_its_hardest_confusions() -> None:
    model, given = build(), batch()
    out = model(*given)
    logits = out.image_BE @ out.text_BE.t()
    logits.fill_diagonal_(-9.0)
    losses = []
    text_BSD = model.text(given.ids_BS, given.valid_BS, None)[0]
    image_BPD = model.image(given.images_BCHW)

    def loss_of(text: int, image: int, label: int) -> Tensor:
        one = torch.ones(1, dtype=torch.bool)
        fused = model.fusion(text_BSD[[text]], given.valid_BS[[text]], image_BPD[[image]], one)
        return F.cross_entropy(model.match(fused.x_BD), torch.tensor([label]))

    for row in range(6):
        losses += [loss_of(row, row, 1), loss_of(int(logits[row].argmax()), row, 0)]
        losses.append(loss_of(row, int(logits[:, row].argmax()), 0))
    torch.testing.assert_close(out.parts["matching"], (sum(losses) / 18).detach())


def without(given: ImageTextBatch, row: int) -> ImageTextBatch:
    """The batch as a loader gives it where the image of a row cannot be read."""
    images, ids, valid, present, items = (
        t.clone() for t in (given.images_BCHW, given.ids_BS, given.valid_BS, given.present_B, given.items_B)
    )
    images[row], ids[row, 1:], valid[row, 1:], present[row], items[row] = 0.0, 0, False, False, -1
    return given._replace(images_BCHW=images, ids_BS=ids, valid_BS=valid, present_B=present, items_B=items)


@pytest.mark.parametrize("config", [SMALL, VQA], ids=["retrieval", "vqa"])
def test_rows_that_are_not_there_count_for_nothing(config: MultimodalModelConfig) -> None:
    given = batch(labels=torch.tensor([0, 1, 2, 3, 4, 0]))
    model = build(config)
    found = model(*without(given, 2))
    kept = torch.tensor([0, 1, 3, 4, 5])
    expected = model(*(None if part is None else part[kept] for part in given))
    torch.testing.assert_close(found.lm_loss, expected.lm_loss)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.moe.assignments_E, expected.moe.assignments_E)
    nothing = model(*given._replace(present_B=torch.zeros(6, dtype=torch.bool)))
    assert float(nothing.lm_loss) == 0
    assert nothing.loss.isfinite()


def test_padding_changes_nothing() -> None:
    model, given = build(), batch()
    wide = given._replace(ids_BS=F.pad(given.ids_BS, (0, 5)), valid_BS=F.pad(given.valid_BS, (0, 5)))
    torch.testing.assert_close(model(*wide).loss, model(*given).loss)


def test_classes_of_text_alone() -> None:
    labels = torch.tensor([0, 1, 2, -100, 1, 0])
    model, given = build(GLUE), batch(images=False, labels=labels, pairs=True)
    assert model.image is None
    assert model.fusion is None
    out = model(*given)
    torch.testing.assert_close(out.lm_loss, F.cross_entropy(out.outputs_BO, labels).detach())
    other = model(*given._replace(segments_BS=None))
    assert (other.outputs_BO - out.outputs_BO).abs().max() > 1e-4, "a pair is not one text"
    no_segments = model(*given._replace(segments_BS=torch.zeros_like(given.ids_BS)))
    torch.testing.assert_close(other.outputs_BO, no_segments.outputs_BO)


def test_scores_of_text_alone() -> None:
    labels = torch.tensor([0.5, 1.0, 5.0, float("nan"), 2.5, 0.0])
    out: MultimodalOutput = build(STSB)(*batch(images=False, labels=labels, pairs=True))
    kept = labels.isfinite()
    torch.testing.assert_close(out.lm_loss, F.mse_loss(out.outputs_BO[kept, 0], labels[kept]).detach())


def test_classes_of_text_and_image() -> None:
    given = batch(labels=torch.tensor([0, 1, 2, 3, 4, 0]))
    model = build(VQA)
    out = model(*given)
    torch.testing.assert_close(out.lm_loss, F.cross_entropy(out.outputs_BO, given.labels_B).detach())
    changed = given._replace(images_BCHW=given.images_BCHW.flip(0))
    assert (model(*changed).outputs_BO - out.outputs_BO).abs().max() > 1e-4, "the image matters"


@pytest.mark.parametrize("config", [SMALL, VQA, GLUE, STSB], ids=["retrieval", "vqa", "glue", "stsb"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_learns(config: MultimodalModelConfig, recompute: bool) -> None:
    labels = torch.rand(24) * 5 if config.goal == "regression" else torch.arange(24) % max(config.num_outputs, 1)
    given = batch(24, images=config.has_images, labels=labels, pairs=not config.has_images)
    model = build(replace(config, activation_checkpointing=recompute), replace(MOE, router="noisy")).train()
    torch.manual_seed(0)
    model(*given).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert idle == []


@pytest.mark.parametrize("gate", [{"router": "noisy", "top_k": 4}, {"router": "softmax", "top_k": 2}])
def test_experts_are_where_the_settings_say(gate: dict[str, Any]) -> None:
    kinds = itertools.product({"both": {"text", "fusion"}, "text": {"text"}, "fusion": {"fusion"}}.items(), (1, 2))
    for (where, parts), every in kinds:
        config = MultimodalConfig(model=replace(SMALL, experts_in=where), moe=replace(MOE, every=every, **gate))
        model = build(config.model, config.moe)
        stats = model(*batch()).moe
        assert len(stats.aux_loss) == len(config.sparse_layers) == 2 * len(parts) // every
        assert {name.split(".")[0] for name, _ in model.named_parameters() if ".experts." in name} == parts
    dense = build(moe=replace(MOE, enabled=False))
    assert dense(*batch()).moe is None


def test_settings_of_a_run_name_the_model() -> None:
    data = ImageTextDataConfig(image_size=16)
    config = MultimodalConfig(model=replace(SMALL, image_size=0, goal="data", inputs="data"), moe=MOE, data=data)
    assert config.problems() == []
    built = build_model("text-image", to_dict(config))
    expected = build(SMALL)
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (built, expected)]
    assert shapes[0] == shapes[1]
