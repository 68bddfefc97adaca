"""A tiny language model that every recipe test shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY = """
max_steps: 4
model: {num_layers: 2, d_model: 32, num_heads: 4, num_kv_heads: 2}
moe: {num_experts: 4, intermediate_size: 16}
data: {seq_len: 32, num_workers: 0}
optim: {warmup_steps: 1}
eval: {every: 2, max_tokens: 256, sample_tokens: 4, sink_sequences: 2}
telemetry: {every: 1, wandb: "off"}
"""


@pytest.fixture
def tiny_flags(tmp_path: Path) -> list[str]:
    """Flags that make any ``lm_16l`` command a matter of seconds."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "ds.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}})
    )
    return ["--config", str(tmp_path / "tiny.yaml"), "--deepspeed_config", str(tmp_path / "ds.json")]


def records(run_dir: Path) -> list[dict]:
    """All objects of a run's metrics file."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
