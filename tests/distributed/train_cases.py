"""One rank that trains ``lm_16l`` several times: ``train_cases.py CASES.json``, a list of command lines.

Many runs share one start, because importing torch and DeepSpeed costs more than training a tiny model.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from moe_scale.telemetry.quiet import quiet
from moe_scale.train.loop import train
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE

if __name__ == "__main__":
    quiet()
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        train(prepare_job(RECIPE, argv))
    dist.destroy_process_group()
