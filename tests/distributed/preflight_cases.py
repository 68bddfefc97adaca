"""One rank that checks its hosts several times, each time with another difference at rank 1, and tells of it as JSON.

``preflight_cases.py RESULT.json SETTINGS...``: every rank calls itself a host of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from moe_scale.errors import ConfigError
from moe_scale.parallel import launch as launches
from moe_scale.parallel import zero
from moe_scale.telemetry.quiet import quiet
from moe_scale.train import preflight
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE

RANK = int(os.environ["RANK"])
VERSIONS = preflight.package_versions()


def differing(name: str, value: Callable[..., Any]) -> Any:
    return mock.patch.object(preflight, name, value) if RANK == 1 else contextlib.nullcontext()


def cases(argv: list[str]) -> Iterator[tuple[str, list[str], Any, str]]:
    """Name, command line, what is replaced, and the data's fingerprint."""
    changed = ["--optim.lr", "0.5", "--deepspeed_override", "gradient_clipping=0.25"] if RANK == 1 else []
    nothing = contextlib.nullcontext()
    yield "same", argv, nothing, "0123456789abcdef"
    yield "settings", [*argv, *changed], nothing, "0123"
    yield "package", argv, differing("package_versions", lambda: VERSIONS | {"torch": "2.12.0"}), "0123"
    yield "code", argv, differing("_code", lambda _: {"code": "deface"}), "0123"
    yield "data", argv, nothing, f"{RANK}" * 16


def outcome(argv: list[str], fingerprint: str) -> dict[str, Any]:
    job = prepare_job(RECIPE, argv)
    launches.export(job.launch)
    zero.init_distributed()
    groups = zero.make_groups(job.config.moe.ep_size)
    printed = io.StringIO()
    try:
        found = preflight.complete(preflight.check_environment(job), fingerprint, groups)
        with contextlib.redirect_stdout(printed):
            preflight.tell(job, found)
        return {"printed": printed.getvalue(), "record": found.record()}
    except ConfigError as error:
        return {"problems": list(map(str, error.problems))}


if __name__ == "__main__":
    quiet()
    result, *argv = sys.argv[1:]
    results = {}
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with mock.patch.object(socket, "gethostname", return_value=f"host{RANK}"):
        for name, settings, replaced, fingerprint in cases(argv):
            with replaced:
                results[name] = outcome(settings, fingerprint)
    everyones = [None, None]
    dist.all_gather_object(everyones, results)
    if RANK == 0:
        Path(result).write_text(json.dumps(everyones))
    dist.destroy_process_group()
