"""classifier: an encoder with experts that gives a text or a sequence of features one of several classes.

python recipes/classifier.py
deepspeed --num_accelerators 2 recipes/classifier.py --moe.ep_size 2 --moe.backend deepspeed
python recipes/classifier.py --help
"""

from moe_scale.config import ClassifierConfig
from moe_scale.parallel.device import has_fast_bf16_cpu
from moe_scale.train.classifier import ClassifierTask
from moe_scale.train.recipe import Recipe, main

# The size of BERT base (arXiv 1810.04805), from scratch, on the largest of GLUE's tasks of single sentences.
LARGE = {
    "max_steps": 20_000,
    "checkpoint": {"every": 1000},
    "data": {"source": "glue/sst2", "batch_examples": 4},
    "model": {"input_size": 768, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_experts": 16,
              "vocab_size": 8000},
    "optim": {"lr": 2e-4, "warmup_steps": 1000},
    "early_stopping": {"metric": "eval/loss", "patience": 10},
    "eval": {"every": 500},
}  # fmt: skip

RECIPE = Recipe(
    name="classifier",
    config_class=ClassifierConfig,
    task=ClassifierTask,
    scales={
        "cpu": {
            "deepspeed_config": f"ds_configs/zero3_cpu{'' if has_fast_bf16_cpu() else '_fp32'}.json",
            "max_steps": 1000,
            "model": {"dropout": 0.3},
            "optim": {"lr": 1e-3, "warmup_steps": 50},
            "early_stopping": {"metric": "eval/loss", "patience": 5},
            "eval": {"every": 40},
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
