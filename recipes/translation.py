"""translation: an encoder-decoder with experts in both halves, between any of 16 languages.

python recipes/translation.py --data.pairs en-de en-fr
deepspeed --num_accelerators 2 recipes/translation.py --moe.ep_size 2
python recipes/translation.py --help
"""

from moe_scale.config import TranslationConfig
from moe_scale.parallel.device import has_fast_bf16_cpu
from moe_scale.train.recipe import Recipe, main
from moe_scale.train.translation import TranslationTask

# A Transformer base (arXiv 1706.03762) with 32 experts a layer, on novels: opus_books, whose directions are named by
# data.pairs.
LARGE = {
    "max_steps": 50_000,
    "checkpoint": {"every": 1000},
    "data": {"source": "opus_books", "pairs": ("en-de", "en-es", "en-fr", "en-hu", "en-it", "en-nl", "en-ru"),
             "batch_tokens": 4096, "pair_temperature": 2.0},
    "moe": {"num_experts": 32, "intermediate_size": 1024},
    "optim": {"lr": 5e-4, "warmup_steps": 2000},
    "eval": {"every": 2000},
}  # fmt: skip

RECIPE = Recipe(
    name="translation",
    config_class=TranslationConfig,
    task=TranslationTask,
    scales={
        # What two directions of the sample take ten minutes for on two cores.
        "cpu": {
            "deepspeed_config": f"ds_configs/zero3_cpu{'' if has_fast_bf16_cpu() else '_fp32'}.json",
            "max_steps": 2000,
            "model": {
                "vocab_size": 4000,
                "num_encoder_layers": 2,
                "num_decoder_layers": 2,
                "d_model": 128,
                "num_heads": 4,
            },
            "moe": {"num_experts": 16, "intermediate_size": 128},
            "data": {"batch_tokens": 256, "max_len": 64},
            "optim": {"lr": 3e-3, "beta2": 0.98, "warmup_steps": 100, "weight_decay": 0.01},
            "eval": {"every": 500},
            "telemetry": {"every": 25},
        },
        "1gpu": {"deepspeed_config": "ds_configs/zero3_1gpu.json", **LARGE},
        "1node": {"deepspeed_config": "ds_configs/zero3_1node.json", **LARGE, "moe": {**LARGE["moe"], "ep_size": 0}},
        "multinode": {
            "deepspeed_config": "ds_configs/zero3_multinode.json",
            **LARGE,
            "moe": {**LARGE["moe"], "ep_size": 0},
            "resume": "auto",
        },
    },
)

if __name__ == "__main__":
    main(RECIPE)
