"""lm_16l: a decoder language model of 16 layers with 64 experts, top-2.

deepspeed recipes/lm_16l.py --deepspeed_config ds_configs/zero3_1gpu.json
deepspeed --num_accelerators 2 recipes/lm_16l.py --moe.ep_size 2
python recipes/lm_16l.py --help
"""

from moe_scale.config import LMConfig
from moe_scale.parallel.device import has_fast_bf16_cpu
from moe_scale.train.language_model import LanguageModelTask
from moe_scale.train.recipe import Recipe, main

# The model of the GPU scales is the dataclasses' defaults. 20,000 steps are 5 to 10 billion tokens.
LARGE = {
    "max_steps": 20_000,
    "checkpoint": {"every": 1000},
    "data": {"seq_len": 2048},
    "optim": {"lr": 4e-4, "warmup_steps": 1000},
}

RECIPE = Recipe(
    name="lm_16l",
    config_class=LMConfig,
    task=LanguageModelTask,
    scales={
        # Everything the large model has, in a size that two CPU cores train in minutes.
        "cpu": {
            "deepspeed_config": f"ds_configs/zero3_cpu{'' if has_fast_bf16_cpu() else '_fp32'}.json",
            "max_steps": 300,
            "model": {"num_layers": 4, "d_model": 256, "num_heads": 8, "num_kv_heads": 4, "loss_chunk_tokens": 2048},
            "moe": {"num_experts": 16, "intermediate_size": 128},
            "data": {"seq_len": 256},
            "optim": {"lr": 3e-3, "warmup_steps": 30},
            "eval": {"every": 150, "max_tokens": 32_768},
        },
        "1gpu": {"deepspeed_config": "ds_configs/zero3_1gpu.json", **LARGE},
        "1node": {"deepspeed_config": "ds_configs/zero3_1node.json", **LARGE, "moe": {"ep_size": 0}},
        "multinode": {
            "deepspeed_config": "ds_configs/zero3_multinode.json",
            **LARGE,
            "moe": {"ep_size": 0},
            "resume": "auto",
        },
    },
)

if __name__ == "__main__":
    main(RECIPE)
