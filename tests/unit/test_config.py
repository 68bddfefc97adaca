"""What the settings find wrong with themselves, class by class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_scale.config import (
    DecoderConfig,
    LMConfig,
    MoEConfig,
    OptimConfig,
    Seq2SeqConfig,
    TextDataConfig,
    TranslationConfig,
    divisors,
    duration_seconds,
)


def text(found: list[Any]) -> list[str]:
    return [str(problem) for problem in found]


def test_defaults_have_no_problems() -> None:
    assert LMConfig().problems() == []
    assert MoEConfig().problems("moe") == []
    assert DecoderConfig().problems("model") == []
    assert TextDataConfig().problems("data") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"top_k": 9, "num_experts": 8}, ["moe.top_k: 9 > moe.num_experts = 8; choose 1 to 8"]),
        ({"top_k": 2, "num_experts": 1}, ["moe.top_k: 2 > moe.num_experts = 1; choose 1"]),
        ({"top_k": 8, "num_experts": 8}, []),
        ({"top_k": 1, "num_experts": 1}, []),
        (
            {"ep_size": 3, "num_experts": 8},
            ["moe.ep_size: 3 does not divide moe.num_experts = 8; choose one of [1, 2, 4, 8]"],
        ),
        (
            {"ep_size": 16, "num_experts": 8},
            ["moe.ep_size: 16 does not divide moe.num_experts = 8; choose one of [1, 2, 4, 8]"],
        ),
        ({"ep_size": 8, "num_experts": 8}, []),
        ({"top_k": 9, "num_experts": 8, "ep_size": 3, "enabled": False}, []),
    ],
)  # fmt: skip
def test_moe(changes: dict[str, Any], expected: list[str]) -> None:
    assert text(MoEConfig(**changes).problems("moe")) == expected


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, []),
        ({"top_k": 4, "dispatch": "capacity"}, ["moe.drop_policy"]),
        ({"top_k": 4, "dispatch": "capacity", "drop_policy": "probability"}, []),
        ({"top_k": 2, "dispatch": "capacity", "drop_policy": "probability"}, ["moe.drop_policy"]),
        ({"top_k": 4}, []),
        ({"top_k": 1, "renormalize": False}, []),
        ({"router": "sigmoid", "aux_loss_scope": "sequence", "renormalize": False},
         ["moe.router", "moe.aux_loss_scope", "moe.renormalize"]),
    ],
)  # fmt: skip
def test_deepspeeds_conventions_leave_no_choice_of_some_settings(changes: dict[str, Any], where: list[str]) -> None:
    found = MoEConfig(conventions="deepspeed", **changes).problems("moe")
    assert [problem.where for problem in found] == where
    assert all("moe.conventions moe_scale" in problem.allowed for problem in found)
    assert MoEConfig(**changes).problems("moe") == []


def test_moe_reports_both_at_once() -> None:
    assert len(MoEConfig(top_k=9, num_experts=8, ep_size=3).problems("here")) == 2


@pytest.mark.parametrize(
    ("changes", "where", "allowed"),
    [
        ({"d_model": 100, "num_heads": 16}, "model.num_heads", "choose one of [1, 2, 4, 5, 10, 20, 25, 50, 100]"),
        ({"d_model": 48, "num_heads": 16}, "model.head_dim", "choose an even width"),
        ({"head_dim": 63}, "model.head_dim", "choose an even width"),
        ({"num_heads": 16, "num_kv_heads": 3}, "model.num_kv_heads", "choose one of [1, 2, 4, 8, 16]"),
        ({"num_heads": 16, "num_kv_heads": 32}, "model.num_kv_heads", "choose one of [1, 2, 4, 8, 16]"),
    ],
)
def test_decoder(changes: dict[str, Any], where: str, allowed: str) -> None:
    (found,) = DecoderConfig(**changes).problems("model")
    assert found.where == where
    assert allowed in found.allowed


def test_a_head_dim_frees_the_number_of_heads() -> None:
    config = DecoderConfig(d_model=100, num_heads=16, head_dim=64)
    assert config.problems("model") == []
    assert config.head_width == 64
    assert DecoderConfig(d_model=128, num_heads=4, num_kv_heads=2).head_width == 32


def test_decoder_reports_both_at_once() -> None:
    assert len(DecoderConfig(d_model=100, num_heads=16, num_kv_heads=3).problems("model")) == 2


def test_text_data() -> None:
    (found,) = TextDataConfig(holdout_fraction=0.0).problems("data")
    assert found.where == "data.holdout_fraction"


@pytest.mark.parametrize(
    ("optim", "max_steps", "where"),
    [
        (OptimConfig(schedule="cosine", warmup_steps=10), 10, ["optim.warmup_steps"]),
        (OptimConfig(schedule="cosine", warmup_steps=9), 10, []),
        (OptimConfig(schedule="cosine", warmup_steps=0), 1, []),
        (OptimConfig(schedule="constant", warmup_steps=100), 10, []),
        (OptimConfig(schedule="wsd", warmup_steps=8, decay_steps=2), 10, []),
        (OptimConfig(schedule="wsd", warmup_steps=8, decay_steps=3), 10, ["optim.decay_steps"]),
        (OptimConfig(schedule="wsd", warmup_steps=9), 10, ["optim.decay_steps"]),
        (OptimConfig(schedule="wsd", warmup_steps=8), 10, []),
        (OptimConfig(schedule="wsd", warmup_steps=10), 10, ["optim.warmup_steps", "optim.decay_steps"]),
        (OptimConfig(schedule="cosine", warmup_steps=1, decay_steps=99), 10, []),
    ],
)
def test_schedules(optim: OptimConfig, max_steps: int, where: list[str]) -> None:
    found = LMConfig(optim=optim, max_steps=max_steps).problems()
    assert [problem.where for problem in found] == where


def test_wsd_decays_over_a_fifth_unless_told() -> None:
    assert LMConfig(max_steps=11).wsd_decay_steps == 3
    assert LMConfig(max_steps=1).wsd_decay_steps == 1
    assert LMConfig(max_steps=11, optim=OptimConfig(decay_steps=7)).wsd_decay_steps == 7


def test_some_layer_is_sparse() -> None:
    config = LMConfig(model=DecoderConfig(num_layers=4), moe=MoEConfig(every=5))
    (found,) = config.problems()
    assert str(found).startswith("moe.every: 5 > model.num_layers = 4")
    assert replace(config, moe=MoEConfig(every=4)).problems() == []
    assert replace(config, moe=MoEConfig(every=5, enabled=False)).problems() == []


def test_problems_of_all_sections_at_once() -> None:
    config = LMConfig(
        max_steps=5,
        moe=MoEConfig(top_k=9, num_experts=8, ep_size=3, every=99),
        model=DecoderConfig(num_heads=7, num_kv_heads=3),
        data=TextDataConfig(holdout_fraction=0.0),
    )
    assert {problem.where for problem in config.problems()} == {
        "moe.top_k", "moe.ep_size", "moe.every", "optim.warmup_steps", "model.num_heads", "model.num_kv_heads",
        "data.holdout_fraction",
    }  # fmt: skip


@given(st.integers(1, 5000))
def test_divisors(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("0:45", 45),
        ("90:30", 90 * 60 + 30),
        ("1:30:00", 90 * 60),
        ("2-12", 60 * 3600),
        ("2-12:30", 60 * 3600 + 30 * 60),
        ("2-12:30:15", 60 * 3600 + 30 * 60 + 15),
        ("0", 0),
        *((bad, None) for bad in ("", "-1", "1h", "1:2:3:4", "1-", "-2", "1-1:1:1:1", "1.5", " 5", "5\n", "1::2")),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert duration_seconds(text) == seconds


def test_a_dense_model_of_equal_parameters_has_whole_groups_of_layers() -> None:
    dense = MoEConfig(enabled=False, dense_size="total", every=2)

    def found(config: Any) -> list[str]:
        return [problem.what for problem in config.problems()]

    assert found(LMConfig(moe=dense, model=DecoderConfig(num_layers=4))) == []
    (what,) = found(LMConfig(moe=dense, model=DecoderConfig(num_layers=3)))
    assert what == "total with moe.every = 2, which does not divide model.num_layers = 3"
    assert found(LMConfig(moe=replace(dense, dense_size="active"), model=DecoderConfig(num_layers=3))) == []
    seq2seq = Seq2SeqConfig(num_encoder_layers=4, num_decoder_layers=3)
    (what,) = found(TranslationConfig(moe=dense, model=seq2seq))
    assert what.endswith("model.num_decoder_layers = 3")
    assert found(TranslationConfig(moe=dense, model=replace(seq2seq, experts_in="encoder"))) == []
