"""multimodal: encoders of texts and images with experts, fused by cross-attention: retrieval, GLUE and VQA.

python recipes/multimodal.py
deepspeed --num_accelerators 2 recipes/multimodal.py --moe.ep_size 2 --moe.num_experts 16
python recipes/multimodal.py --data.source glue/mrpc --model.pretrained runs/multimodal --output_dir runs/mrpc
python recipes/multimodal.py --help
"""

from moe_scale.config import MultimodalConfig
from moe_scale.parallel.device import has_fast_bf16_cpu
from moe_scale.train.multimodal import MultimodalTask
from moe_scale.train.recipe import Recipe, main

# Images of 224 pixels in patches of 16, as ViT has them (arXiv 2010.11929), and captions of 64 tokens.
LARGE = {
    "max_steps": 100_000,
    "checkpoint": {"every": 1000},
    "data": {"image_size": 224, "batch_examples": 16, "num_workers": 4},
    "optim": {"lr": 5e-4, "beta2": 0.98, "warmup_steps": 2000, "weight_decay": 0.2},
    "eval": {"every": 1000},
}  # fmt: skip
LARGE_MODEL = {"patch_size": 16, "vocab_size": 64_000, "activation_checkpointing": True}

# 250 million parameters, 175 active: ViT-B/16 beside a text encoder with experts in every other layer.
BASE = {
    "model": {**LARGE_MODEL, "vocab_size": 32_000, "text_layers": 12, "text_width": 512, "text_heads": 8,
              "image_layers": 12, "image_width": 768, "image_heads": 12, "fusion_layers": 4, "fusion_width": 512,
              "fusion_heads": 8, "embed_size": 512},
    "moe": {"num_experts": 8, "intermediate_size": 1024, "every": 2},
}  # fmt: skip

# 1.3 billion, 0.6 active: ViT-L/16 and 16 experts.
BILLION = {
    "model": {**LARGE_MODEL, "text_layers": 12, "text_width": 768, "text_heads": 12, "image_layers": 24,
              "image_width": 1024, "image_heads": 16, "fusion_layers": 6, "fusion_width": 768, "fusion_heads": 12,
              "embed_size": 768},
    "moe": {"num_experts": 16, "intermediate_size": 2304, "every": 2, "ep_size": 0},
}  # fmt: skip

# 13 billion, 1.6 active: ViT-H/16 and 64 experts.
THIRTEEN_BILLION = {
    "model": {**LARGE_MODEL, "text_layers": 24, "text_width": 1024, "text_heads": 16, "image_layers": 32,
              "image_width": 1280, "image_heads": 16, "fusion_layers": 8, "fusion_width": 1024, "fusion_heads": 16,
              "embed_size": 1024},
    "moe": {"num_experts": 64, "intermediate_size": 3712, "every": 2, "ep_size": 0},
}  # fmt: skip

RECIPE = Recipe(
    name="multimodal",
    config_class=MultimodalConfig,
    task=MultimodalTask,
    scales={
        # Emoji are drawn upright, centred and in colours that mean something: cropping and colouring them only hurts,
        # and 24 pixels hold what 1,600 pictures can teach.
        "cpu": {
            "deepspeed_config": f"ds_configs/zero3_cpu{'' if has_fast_bf16_cpu() else '_fp32'}.json",
            "max_steps": 400,
            "data": {"image_size": 24, "augment": False, "batch_examples": 32},
            "model": {"vocab_size": 1000, "pooling": "mean", "text_layers": 2, "text_width": 384, "text_heads": 6,
                      "patch_size": 12, "image_layers": 2, "image_width": 384, "image_heads": 6,
                      "fusion_layers": 1, "fusion_width": 64, "fusion_heads": 2, "embed_size": 384},
            "moe": {"num_experts": 8, "intermediate_size": 128},
            "optim": {"lr": 1e-3, "beta2": 0.98, "warmup_steps": 50},
            "eval": {"every": 100},
        },
        "1gpu": {"deepspeed_config": "ds_configs/zero3_1gpu.json", **LARGE, **BASE},
        "1node": {"deepspeed_config": "ds_configs/zero3_1node.json", **LARGE, **BILLION},
        "multinode": {
            "deepspeed_config": "ds_configs/zero3_multinode.json",
            **LARGE,
            **THIRTEEN_BILLION,
            "resume": "auto",
        },
    },
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
