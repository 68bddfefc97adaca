"""``moe-scale doctor``: check the hosts of a run, its data and its links, without training.

It is what every run of several ranks does before its first step. A launcher starts it as it would start the recipe::

    moe-scale doctor recipes/lm_16l.py
    deepspeed --hostfile hostfiles/2x8 --module moe_scale.cli doctor recipes/lm_16l.py --scale multinode
    srun --kill-on-bad-exit=1 --nodes 2 --ntasks-per-node 8 moe-scale doctor recipes/lm_16l.py --scale multinode
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.distributed as dist

from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.parallel.watchdog import Watchdog
from moe_scale.tools.compare import load_recipe
from moe_scale.train import preflight
from moe_scale.train.recipe import prepare_job
from moe_scale.train.start import prepare_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's own flags; whatever else is given goes to the recipe."""
    parser.add_argument("recipe", help="file of the recipe, as recipes/lm_16l.py; its settings follow")


def run(arguments: argparse.Namespace, recipe_argv: list[str]) -> None:
    """Check everything, prepare the data, and print one table. Runs under any launcher."""
    recipe_file = Path(arguments.recipe)
    job = prepare_job(load_recipe(recipe_file), recipe_argv, look_at_folder=False)
    launches.export(job.launch)
    zero.init_distributed()
    with Watchdog(hang_s=60 * job.config.faults.hang_minutes) as watchdog:
        watchdog.at(0, "checking the hosts")
        facts = preflight.check_environment(job, recipe_file)
        groups = zero.make_groups(job.config.moe.ep_size if job.config.moe.enabled else 1)
        watchdog.at(0, "preparing the data", timed=False)
        prepare_data(job)
        watchdog.at(0, "measuring the links")
        found = preflight.complete(facts, job.task.data_fingerprint, groups)
        preflight.tell(job, found, all_hosts=True)
        dist.barrier()
    if job.launch.is_main:
        ranks = "1 rank is" if job.launch.world_size == 1 else f"all {job.launch.world_size} ranks are"
        print(f"{ranks} ready for {job.name} at scale {job.config.scale}")
    dist.destroy_process_group()
