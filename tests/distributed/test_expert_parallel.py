"""The expert-parallel layer on real ranks equals the layer of one process, in fp64: outputs and all gradients.

What is compared is in ``expert_parallel_cases.py``: every router, ranks without tokens, with unequal numbers of them
and with disjoint experts, dense halves that run during the exchange, recomputation, the global balancing loss, and
layers and batches that hypothesis draws.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_expert_parallel_layer_equals_the_layer_of_one_process(num_ranks: int) -> None:
    """A hang fails by the timeout, with every rank's output."""
    printed = run_ranks(num_ranks, [str(Path(__file__).with_name("expert_parallel_cases.py"))], timeout=200)
    assert int(printed.rsplit("compared ", 1)[1]) > 1500
