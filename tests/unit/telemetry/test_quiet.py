"""Known noise is gone, and everything else still shows. Each case is a process of its own: filters are global."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from moe_scale.telemetry import quiet as module
from moe_scale.telemetry.quiet import NO_ACCELERATOR, quiet

ZERO3 = """
import logging, warnings
from moe_scale.telemetry.quiet import quiet
quiet()
import torch, deepspeed
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled, for a minute
deepspeed.init_distributed("gloo")
config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
          "bf16": {"enabled": True}}
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
def step():
    engine.backward(engine(torch.ones(2, 8, dtype=torch.bfloat16)).float().sum())
    engine.step()
for _ in range(3):
    step()
warnings.warn("`torch.distributed.other` is deprecated", FutureWarning)
warnings.warn_explicit("something real of torch", FutureWarning, "f.py", 1, module="torch.distributed.c10d_logger")
warnings.warn_explicit("`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning, "f.py", 2, "mine")
logging.getLogger("DeepSpeed").warning("something real of DeepSpeed")
print("--- without the filters", flush=True)
warnings.resetwarnings()
step()
torch.distributed.destroy_process_group()
"""
REAL = ("`torch.distributed.other`", "something real of torch", "f.py:2", "something real of DeepSpeed")
NOISE = "torch.distributed.reduce_scatter_tensor` is deprecated. Please use"


def run(script: str) -> str:
    """What the script prints in a process of its own, as a launcher starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "MOE_SCALE_VERBOSE")}
    env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-u", "-c", script],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_zero3_run_prints_what_is_real_and_nothing_else():
    quieted, _, loud = run(ZERO3).partition("--- without the filters")
    for text in REAL:
        assert text in quieted
    assert NOISE not in quieted
    # Three warnings of two lines at most (the text and its source line) and one of the logger's.
    assert len(quieted.splitlines()) <= 7, quieted
    if hasattr(torch.distributed, "all_gather_single"):
        # Fails once DeepSpeed calls the collectives by their new names: then the filter can go.
        assert NOISE in loud


@pytest.mark.parametrize(("value", "installed"), [("1", False), ("0", True), ("", True)])
def test_verbose_turns_everything_off(monkeypatch, deepspeed_logger, value, installed):
    monkeypatch.setenv("MOE_SCALE_VERBOSE", value)
    with warnings.catch_warnings():
        before = list(warnings.filters)
        quiet()
        quiet()
        assert (warnings.filters != before) == installed
        assert len(warnings.filters) - len(before) == (len(module.NOISE) if installed else 0)
    assert len(deepspeed_logger.filters) == installed


@pytest.fixture
def deepspeed_logger(monkeypatch):
    """DeepSpeed's logger without filters, put back afterwards."""
    monkeypatch.delenv("MOE_SCALE_VERBOSE", raising=False)
    logger = logging.getLogger("DeepSpeed")
    kept = (logger.filters, logger.level)
    logger.filters = []
    yield logger
    logger.filters = kept[0]
    logger.setLevel(kept[1])


def test_the_cpu_remark_shows_once_and_only_where_there_is_a_device(monkeypatch, deepspeed_logger, tmp_path):
    with warnings.catch_warnings():
        quiet()
    (tmp_path / "nvidia0").touch()
    present, absent = (str(tmp_path / "nvidia*"),), (str(tmp_path / "kfd"),)

    def passes(text: str, device_files: tuple[str, ...], local_rank: str) -> bool:
        monkeypatch.setattr(module, "DEVICE_FILES", device_files)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        return bool(deepspeed_logger.filter(logging.makeLogRecord({"msg": text})))

    assert not passes(NO_ACCELERATOR, absent, "0")
    assert passes(NO_ACCELERATOR, present, "0")
    assert not passes(NO_ACCELERATOR, present, "1")
    assert passes("something else", absent, "1")
