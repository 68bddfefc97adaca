"""One rank that trains several times: ``train_cases.py CASES.json [RECIPE]``, a list of command lines of a recipe.

Between them may stand ``{"copy": [[FROM, INTO], ...]}``: folders that the first rank copies then.
Many runs share one start, because importing torch and DeepSpeed costs more than training a tiny model.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from moe_scale.telemetry.quiet import quiet
from moe_scale.train.loop import train
from moe_scale.train.recipe import prepare_job

if __name__ == "__main__":
    quiet()
    cases, recipe = [*sys.argv[1:], "lm_16l"][:2]
    for case in json.loads(Path(cases).read_text()):
        if isinstance(case, dict):
            for source, target in case["copy"] if dist.get_rank() == 0 else ():
                shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            dist.barrier()
        else:
            train(prepare_job(importlib.import_module(f"recipes.{recipe}").RECIPE, case))
    dist.destroy_process_group()
