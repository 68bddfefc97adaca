"""Counts of a model of texts and images against the module, and the sizes that the recipe names."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_scale.config import MultimodalModelConfig
from moe_scale.models.multimodal_counts import num_active_params, num_params, training_flops
from moe_scale.models.text_image import TextImageModel
from tests.unit.models.test_text_image import GLUE, MOE, SMALL, STSB, VQA, batch

GOALS = {"retrieval": SMALL, "without-fusion": replace(SMALL, fusion_layers=0), "glue": GLUE, "stsb": STSB, "vqa": VQA}
RETRIEVE = ("retrieval", "without-fusion")
WIDE = {"text_width": 20, "fusion_width": 12, "image_hidden": 30, "fusion_layers": 3}


@pytest.mark.parametrize("name", GOALS)
def test_parameters_are_those_of_the_module(name: str) -> None:
    kinds = itertools.product(("learned", "alibi"), ("pre", "post"), ("both", "text", "fusion"), (True, False), (1, 2))
    for positions, order, where, enabled, every in kinds:
        model = replace(GOALS[name], positions=positions, norm_order=order, experts_in=where, max_positions=7)
        model = replace(model, **{k: v for k, v in WIDE.items() if k != "fusion_layers" or model.fusion_layers})
        moe = replace(MOE, enabled=enabled, every=every, expert_bias=enabled)
        with torch.device("meta"):
            built = TextImageModel(model, moe)
        by_part = {"text": 0, "image": 0, "fusion": 0, "heads": 0}
        for path, parameter in built.named_parameters():
            part = path.split(".")[0]
            by_part[part if part in by_part else "heads"] += parameter.numel()
        assert vars(num_params(model, moe)) == by_part
        unused = sum(p.numel() for path, p in built.named_parameters() if ".experts." in path) / 2
        assert num_active_params(model, moe).total == sum(by_part.values()) - unused


@pytest.mark.parametrize("name", GOALS)
def test_flops_are_those_of_the_products(name: str) -> None:
    """Against torch's own counter, over all products of the forward pass of a batch."""
    dense, rows = replace(MOE, enabled=False), 6
    model: MultimodalModelConfig = replace(GOALS[name], text_width=20, image_hidden=30)
    labels = torch.rand(rows) if model.goal == "regression" else torch.arange(rows) % 3
    given = batch(rows, images=model.has_images, labels=labels)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        TextImageModel(model, dense).eval()(*given)
    # Features with features, both ways; for hard negatives once more.
    products = (3 if model.fusion_layers else 2) * 2 * rows * rows * model.embed_size if name in RETRIEVE else 0
    assert counter.get_total_flops() == rows * training_flops(model, dense, 7) / 3 + products
    # A router works on every position that its experts work on.
    sparse = [7 * model.text_layers * model.text_width]
    if model.has_fusion:
        pairs = 3 if name in RETRIEVE else 1
        sparse.append(pairs * (7 + model.image.num_patches + 1) * model.fusion_layers * model.fusion_width)
    assert training_flops(model, MOE, 7) == training_flops(model, dense, 7) + 6 * MOE.num_experts * sum(sparse)
