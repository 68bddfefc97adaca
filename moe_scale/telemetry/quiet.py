"""Silences what libraries print that a user can do nothing about: line by line, by text and origin, and nothing else.

Found by reading all that runs with ZeRO-0 to 3 print, on one and two ranks, under torchrun and DeepSpeed's launcher.
What says something real stays: DeepSpeed's warnings, timers that a user switched on, the build of an operator, errors.
"""

from __future__ import annotations

import glob
import logging
import os
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Noise:
    """One warning that is not shown: regular expressions of the start of its text and of the module it is raised in."""

    message: str
    category: type[Warning]
    module: str
    why: str


NOISE = (
    Noise(
        message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed\.",
        why="DeepSpeed's ZeRO calls them by these names; torch repeats it with every step, on every rank",
    ),
)

NO_ACCELERATOR = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
"""DeepSpeed's remark on a machine where it found no accelerator (real_accelerator.py)."""

DEVICE_FILES = (
    "/dev/nvidia[0-9]*",
    "/dev/kfd",
    "/dev/dri/renderD*",
    "/dev/dxg",
    "/dev/accel*",
    "/dev/davinci[0-9]*",
)
"""What the drivers of NVIDIA, AMD, Intel, WSL, Habana and Ascend devices create."""


def quiet() -> None:
    """Install the filters in this process; calling it again changes nothing.

    It works however the process was started, and before or after DeepSpeed is imported; DeepSpeed's remark about the
    CPU comes with its import, so call it before. ``MOE_SCALE_VERBOSE=1`` makes it do nothing.
    """
    if os.environ.get("MOE_SCALE_VERBOSE", "") not in ("", "0"):
        return
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise.message, category=noise.category, module=noise.module)
    deepspeed_logger = logging.getLogger("DeepSpeed")
    # The default of today's releases; older ones told of every step of their set-up, on every rank.
    deepspeed_logger.setLevel(logging.WARNING)
    if not any(isinstance(f, _CpuRemark) for f in deepspeed_logger.filters):
        deepspeed_logger.addFilter(_CpuRemark())


class _CpuRemark(logging.Filter):
    """Drops :data:`NO_ACCELERATOR` where it is plainly so, and on all ranks of a machine but the first.

    Where a driver has made device files the remark is the one sign that torch cannot use them, and stays.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != NO_ACCELERATOR:
            return True
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        return first and any(glob.glob(pattern) for pattern in DEVICE_FILES)
