"""Work for the processes of a test. Imports little, because every process imports it anew."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from moe_scale.data import cache


def build_in_process(folder: Path, barrier: Any, results: Any) -> None:
    """Ask for ``folder`` together with the others; report who built it and what is in it."""
    built: list[int] = []

    def build(aside: Path) -> None:
        built.append(os.getpid())
        (aside / "data").write_text("half")
        time.sleep(0.2)
        (aside / "data").write_text("complete")
        (aside / cache.MANIFEST).write_text("{}")

    barrier.wait(60)
    cache.build_once(folder, build, lambda line: None)
    results.put((len(built), (folder / "data").read_text()))
