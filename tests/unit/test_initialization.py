"""Initial weights: the same by path, whatever builds the model around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_scale.initialization import Init


def test_a_weight_follows_from_seed_and_path_alone() -> None:
    drawn = [
        (Init(seed) / path).normal_(torch.empty(64, 64), 0.5) for seed, path in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
    assert drawn[0].abs().max() <= 1.5
    torch.testing.assert_close(drawn[0].std(), torch.tensor(0.5), rtol=0.05, atol=0)


def test_a_bf16_weight_is_the_fp32_one_rounded_inside_zero_init_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There ``torch.empty`` gives bf16 whatever it is asked for; a draw in bf16 is another in rare elements."""
    expected = Init(3, "experts").normal_(torch.empty(512, 512), 0.1).bfloat16()
    weight = torch.empty(512, 512, dtype=torch.bfloat16)
    empty = torch.empty

    def as_in_zero_init(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).bfloat16()

    monkeypatch.setattr(torch, "empty", as_in_zero_init)
    assert torch.equal(Init(3, "experts").normal_(weight, 0.1), expected)
