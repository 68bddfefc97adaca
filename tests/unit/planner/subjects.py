"""Small runs to plan."""

from __future__ import annotations

from collections.abc import Sequence

from moe_scale.planner.cluster import Cluster, preset
from moe_scale.planner.model import Subject, read_subject
from recipes import multimodal
from recipes.lm_16l import RECIPE

SETTINGS = """
--model.num_layers 2 --model.d_model 64 --model.num_heads 4 --model.num_kv_heads 2 --model.vocab_size 512
--moe.num_experts 8 --moe.intermediate_size 32 --data.seq_len 32 --deepspeed_config ds_configs/zero3_1node.json
"""
MULTIMODAL = """
--scale 1node --data.image_size 16 --model.patch_size 8 --model.vocab_size 2000 --model.text_layers 2
--model.text_width 64 --model.text_heads 4 --model.image_layers 2 --model.image_width 96 --model.image_heads 4
--model.fusion_layers 2 --model.fusion_width 64 --model.fusion_heads 4 --model.embed_size 32
--moe.num_experts 8 --moe.intermediate_size 96 --deepspeed_config ds_configs/zero3_1node.json
"""


def small(*settings: str, ds: Sequence[str] = (), cluster: Cluster | None = None) -> Subject:
    """A run of a small model on 8 A100, unless another cluster is given."""
    override = ["--deepspeed_override", *ds] if ds else []
    return read_subject(
        RECIPE, [*SETTINGS.split(), "--moe.ep_size", "1", *settings, *override], cluster or preset("A100-80")
    )


def small_multimodal(*settings: str, ds: Sequence[str] = (), cluster: Cluster | None = None) -> Subject:
    """The same of a small model of texts and images."""
    override = ["--deepspeed_override", *ds] if ds else []
    return read_subject(multimodal.RECIPE, [*MULTIMODAL.split(), *settings, *override], cluster or preset("A100-80"))
