"""One training run, spread in every way that is supported, gives one curve: 20 losses and global gradient norms."""

from __future__ import annotations

from typing import Any

import pytest

from moe_scale.config import MoEConfig
from moe_scale.moe.backends.support import unsupported
from tests.curves import STEPS, CharacterRuns, Curve, Runs, assert_same

BACKENDS: tuple[Any, ...] = ("custom", "deepspeed", "autoep")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return CharacterRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def on_one_rank(runs: Runs) -> dict[str, Curve]:
    """All that the default suite runs on one rank, of one start; ``one`` is without any sharding."""
    curves = runs.train(1, {"one": runs.argv("one", 1, stage=0)} | chosen(runs, 1, True))
    curve = curves["one"]
    assert len(curve) == STEPS
    assert curve[0][0] - 0.3 > curve[-1][0], "the model must learn something for its curve to say something"
    return curves


@pytest.fixture(scope="module")
def one_rank(on_one_rank: dict[str, Curve]) -> Curve:
    """The curve against which all others are held."""
    return on_one_rank["one"]


@pytest.fixture(scope="module")
def on_two_ranks(runs: Runs) -> dict[str, Curve]:
    """All that the default suite runs on two ranks, of one start."""
    return runs.train(2, chosen(runs, 2, True) | others(runs))


def layouts(runs: Runs, world_size: int) -> dict[str, list[str]]:
    """Every backend at ZeRO 1 to 3 with every ep_size that it supports; ZeRO-3 with and without ``zero.Init``.

    On four ranks ZeRO 1 and 2 are run with ep_size 2 alone, where experts are both spread and copied.
    """
    cases = {}
    for backend in BACKENDS:
        for ep_size in (size for size in (1, 2, 4) if size <= world_size):
            for stage, built in ((1, "whole"), (2, "whole"), (3, "sharded"), (3, "whole")):
                left_out = world_size == 4 and stage < 3 and ep_size != 2
                moe = MoEConfig(num_experts=4, backend=backend, ep_size=ep_size)
                if left_out or unsupported(moe, zero_stage=stage):
                    continue
                name = f"world{world_size}-{backend}-ep{ep_size}-zero{stage}-built-{built}"
                flags = ("--moe.backend", backend, "--moe.ep_size", str(ep_size))
                flags += ("--zero_init", str(built == "sharded").lower())
                cases[name] = runs.argv(name, world_size, stage=stage, extra=flags)
    return cases


DEFAULT = {
    1: ("zero3-built-sharded",),
    2: ("zero3-built-sharded", "zero1", "custom-ep2-zero3-built-whole"),
    4: ("custom-ep2-zero3-built-sharded",),
}
"""What is in the names of the layouts that the default suite runs; the rest is long."""


def chosen(runs: Runs, world_size: int, default: bool) -> dict[str, list[str]]:
    """The layouts that the default suite runs, or the rest."""
    cases = layouts(runs, world_size)
    return {name: argv for name, argv in cases.items() if any(part in name for part in DEFAULT[world_size]) == default}


@pytest.mark.parametrize(
    ("world_size", "default", "number"),
    [
        (1, True, 3),
        (2, True, 11),
        (4, True, 1),
        pytest.param(1, False, 9, marks=pytest.mark.long),
        pytest.param(2, False, 9, marks=pytest.mark.long),
        pytest.param(4, False, 19, marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(600)
def test_every_layout_gives_the_curve_of_one_rank(
    world_size: int, default: bool, number: int, runs: Runs, one_rank: Curve, request: pytest.FixtureRequest
) -> None:
    cases = chosen(runs, world_size, default)
    assert len(cases) == number
    ready = {1: "on_one_rank", 2: "on_two_ranks"} if default else {}
    curves = request.getfixturevalue(ready[world_size]) if world_size in ready else runs.train(world_size, cases)
    assert_same({name: curves[name] for name in cases}, one_rank)


RULES = (
    "--moe.dispatch", "capacity", "--moe.capacity_factor", "0.6", "--moe.min_capacity", "1",
    "--moe.aux_loss_weight", "0.1", "--moe.ep_size", "2",
)  # fmt: skip


def others(runs: Runs) -> dict[str, list[str]]:
    """More runs on two ranks."""
    cases = {}
    for backend in BACKENDS:
        cases[f"zero0-{backend}"] = runs.argv(f"zero0-{backend}", 2, stage=0, extra=("--moe.backend", backend))
    recomputed = ("--moe.ep_size", "2", "--model.activation_checkpointing", "true")
    cases["recomputed"] = runs.argv("recomputed", 2, stage=3, extra=recomputed)
    for rules, backend in (("moe_scale", "custom"), ("deepspeed", "custom"), ("deepspeed", "deepspeed")):
        name, flags = f"{backend}-by-{rules}", ("--moe.conventions", rules, "--moe.backend", backend)
        cases[name] = runs.argv(name, 2, stage=3, extra=(*RULES, *flags))
    return cases


@pytest.mark.timeout(600)
def test_zero_0_and_recomputation_give_the_curve_of_one_rank(on_two_ranks: dict[str, Curve], one_rank: Curve) -> None:
    found = {name: on_two_ranks[name] for name in ("zero0-custom", "zero0-deepspeed", "zero0-autoep", "recomputed")}
    assert_same(found, one_rank)


@pytest.mark.timeout(600)
def test_backends_by_deepspeeds_conventions_give_one_curve(on_two_ranks: dict[str, Curve]) -> None:
    """Its capacity, drops and balancing loss, in it and in the custom layer, with experts on both ranks."""
    by_deepspeed = on_two_ranks["custom-by-deepspeed"]
    assert_same({"custom": by_deepspeed}, on_two_ranks["deepspeed-by-deepspeed"])
    gap = abs(on_two_ranks["custom-by-moe_scale"][-1][0] - by_deepspeed[-1][0])
    assert gap > 1e-3, "or the rules would not matter in this run"


@pytest.mark.long
def test_triton_kernels_in_their_interpreter(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow, so a few steps; under ZeRO-3 parameters come and go around the kernels' Function."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    few = ("--max_steps", "2", "--optim.warmup_steps", "1")
    expected = runs.train(1, {"torch": runs.argv("torch", 1, stage=0, extra=few)})["torch"]
    cases = {
        name: runs.argv(name, 2, stage=3, extra=(*few, "--moe.kernels", "triton", *flags))
        for name, flags in {
            "ep1-checkpointed": ("--model.activation_checkpointing", "true"),
            "ep2": ("--moe.ep_size", "2"),
        }.items()
    }
    assert_same(runs.train(2, cases), expected)
