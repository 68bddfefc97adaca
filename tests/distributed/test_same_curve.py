"""One training run, spread in every way that is supported, gives one curve."""

from __future__ import annotations

import pytest

from tests.curves import STEPS, Curve, Runs, assert_same


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one_rank(runs: Runs) -> Curve:
    """The curve of one rank without any sharding, against which all others are held."""
    curve = runs.train(1, {"one": runs.argv("one", 1, stage=0)})["one"]
    assert len(curve) == STEPS
    assert curve[0][0] > curve[-1][0], "the model must learn something for its curve to say something"
    return curve


def test_zero_stages_and_backends_on_two_ranks(runs: Runs, one_rank: Curve) -> None:
    cases = {f"zero{stage}": runs.argv(f"zero{stage}", 2, stage=stage) for stage in range(4)}
    for backend in ("custom", "deepspeed", "autoep"):
        for ep_size in (1, 2):
            name = f"{backend}-ep{ep_size}"
            flags = ("--moe.backend", backend, "--moe.ep_size", str(ep_size))
            cases[name] = runs.argv(name, 2, stage=3, extra=flags)
    cases["custom-ep2-built-whole"] = runs.argv(
        "custom-ep2-built-whole", 2, stage=3, extra=("--moe.ep_size", "2", "--zero_init", "false")
    )
    for stage in (1, 2):
        name = f"autoep-ep2-zero{stage}"
        cases[name] = runs.argv(name, 2, stage=stage, extra=("--moe.backend", "autoep", "--moe.ep_size", "2"))
    cases["checkpointed"] = runs.argv(
        "checkpointed", 2, stage=3, extra=("--moe.ep_size", "2", "--model.activation_checkpointing", "true")
    )
    assert_same(runs.train(2, cases), one_rank)


@pytest.mark.parametrize("backend", ["custom", "deepspeed", "autoep"])
def test_four_ranks(backend: str, runs: Runs, one_rank: Curve) -> None:
    cases = {}
    for ep_size in (1, 2, 4):
        name = f"{backend}-ep{ep_size}-world4"
        flags = ("--moe.backend", backend, "--moe.ep_size", str(ep_size))
        cases[name] = runs.argv(name, 4, stage=3, extra=flags)
    assert_same(runs.train(4, cases), one_rank)


@pytest.mark.slow
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
