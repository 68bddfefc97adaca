"""switch: a Switch Transformer, whose every other layer sends each token to one expert.

python recipes/switch.py
python recipes/switch.py --model.objective span_corruption --eval.prompt "O, she doth <extra_id_0> to burn bright"
deepspeed --num_accelerators 2 recipes/switch.py --moe.ep_size 2 --moe.backend deepspeed
python recipes/switch.py --help
"""

from moe_scale.config import SwitchConfig
from moe_scale.parallel.device import has_fast_bf16_cpu
from moe_scale.train.recipe import Recipe, main
from moe_scale.train.switch import SwitchTask

# A Switch-Base (arXiv 2101.03961) as a decoder: 12 layers of width 768, every other one with 128 experts.
LARGE = {
    "max_steps": 20_000,
    "checkpoint": {"every": 1000},
    "data": {"tokenizer": "gpt2", "seq_len": 1024},
    "model": {"vocab_size": 50_432, "num_layers": 12, "d_model": 768, "num_heads": 12},
    "moe": {"num_experts": 128, "intermediate_size": 3072},
    "optim": {"lr": 4e-4, "warmup_steps": 1000},
}  # fmt: skip

RECIPE = Recipe(
    name="switch",
    config_class=SwitchConfig,
    task=SwitchTask,
    scales={
        # Characters of Shakespeare, some minutes on two cores.
        "cpu": {
            "deepspeed_config": f"ds_configs/zero3_cpu{'' if has_fast_bf16_cpu() else '_fp32'}.json",
            "max_steps": 1200,
            "data": {"seq_len": 128},
            "optim": {"lr": 2e-3, "warmup_steps": 100, "beta2": 0.98},
            "eval": {"every": 150, "max_tokens": 32_768},
            "telemetry": {"every": 20},
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
