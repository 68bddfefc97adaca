"""Runs that are saved and continued: to the bit on the same ranks, to rounding under any other layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.curves import STEPS, CharacterRuns, Curve, Runs, assert_same

HALF = STEPS // 2
LAYOUTS = [(4, 4), (4, 1), (2, 2), (2, 1), (1, 1)]


def resumable(runs: Runs, name: str, world_size: int, **how: object) -> list[str]:
    """The command line of a run whose learning rate does not depend on how many steps it is to make."""
    extra = (*how.pop("extra", ()), "--optim.schedule", "constant")  # type: ignore[misc]
    return runs.argv(name, world_size, extra=extra, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return CharacterRuns(tmp_path_factory.mktemp("checkpoints-quick"))


def same_ranks_cases() -> dict[str, dict[str, object]]:
    """Every ZeRO stage, precision and optimizer, and what else has a state of its own."""
    cases: dict[str, dict[str, object]] = {}
    for stage in (0, 1, 2, 3):
        cases[f"zero{stage}-fp32"] = {"stage": stage}
        cases[f"zero{stage}-8bit"] = {"stage": stage, "extra": ("--optim.name", "adamw8bit")}
    for stage in (0, 1, 3):
        cases[f"zero{stage}-bf16"] = {"stage": stage, "ds": ("bf16.enabled=true",)}
    spread = ("--moe.ep_size", "2")
    cases["ep2-8bit"] = {"stage": 3, "extra": (*spread, "--optim.name", "adamw8bit")}
    cases["ep2-bf16"] = {"stage": 3, "extra": spread, "ds": ("bf16.enabled=true",)}
    cases["noisy"] = {"stage": 3, "extra": (*spread, "--moe.router", "noisy", "--moe.expert_dropout", "0.1")}
    cases["sigmoid"] = {"stage": 3, "extra": (*spread, "--moe.router", "sigmoid", "--moe.bias_update_rate", "0.09")}
    cases["deepspeed"] = {"stage": 3, "extra": (*spread, "--moe.backend", "deepspeed")}
    cases["autoep"] = {"stage": 2, "extra": (*spread, "--moe.backend", "autoep")}
    cases["offload"] = {"stage": 3, "ds": ("zero_optimization.offload_optimizer.device=cpu",)}
    cases["offload-all"] = {"stage": 3, "ds": (*cases["offload"]["ds"], "zero_optimization.offload_param.device=cpu")}  # type: ignore[misc]
    cases["foreground"] = {"stage": 3, "extra": (*spread, "--checkpoint.background", "false")}
    return cases


QUICK = ("zero0-bf16", "zero1-8bit", "zero2-fp32", "zero3-fp32", "ep2-8bit", "sigmoid", "deepspeed", "autoep")
"""Cases of the default suite, in which every state that is saved in a way of its own appears."""


@pytest.mark.parametrize("names", [QUICK, pytest.param(None, marks=pytest.mark.long)], ids=["some", "the rest"])
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(names: tuple[str, ...] | None, quick: Runs) -> None:
    runs = quick
    cases = {name: how for name, how in same_ranks_cases().items() if (name in QUICK) == (names is not None)}
    assert len(cases) == (8 if names else 12)
    argvs = {name: [*resumable(runs, name, 2, **dict(how)), "--max_steps", "6"] for name, how in cases.items()}
    runs.run(2, {name: [*argv, "--checkpoint.every", "3"] for name, argv in argvs.items()})
    whole = {name: runs.curve(name) for name in cases}
    for name in cases:
        shutil.rmtree(runs.folder / name / "checkpoints" / "step_00000006")
    runs.run(2, {name: [*argv, "--resume", "must"] for name, argv in argvs.items()})
    for name in cases:
        assert (runs.folder / name / "checkpoints" / "step_00000006").is_dir(), name
        assert len(whole[name]) == 6
        assert runs.curve(name) == whole[name], name


def other_layouts() -> dict[tuple[int, str], dict[str, object]]:
    """(world size, name) and settings of every layout, ZeRO stage and backend that go together."""
    cases: dict[tuple[int, str], dict[str, object]] = {}
    for world_size, ep_size in LAYOUTS:
        for backend in ("custom", "deepspeed", "autoep"):
            for stage in (1, 2, 3):
                if ep_size > 1 and stage < 3 and backend != "autoep":
                    continue  # the settings refuse it
                name = f"{world_size}-ranks-ep{ep_size}-{backend}-zero{stage}"
                spread = ("--moe.ep_size", str(ep_size), "--moe.backend", backend)
                cases[world_size, name] = {"stage": stage, "extra": spread}
    return cases


SOME_LAYOUTS = (
    "4-ranks-ep4-custom-zero3",
    "2-ranks-ep2-autoep-zero2",
    "2-ranks-ep1-deepspeed-zero1",
    "1-ranks-ep1-custom-zero2",
    "1-ranks-ep1-autoep-zero3",
)
"""The layouts that the default suite opens a checkpoint in; the rest is long."""


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.long)], ids=["some", "the rest"])
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_checkpoint_opens_anywhere(some: bool, quick: Runs) -> None:
    """Saved at 4 ranks, ep_size 2, ZeRO-3; the next steps anywhere else are those of the uninterrupted run."""
    half, steps = (5, 10) if some else (HALF, STEPS)
    length, whole = ("--max_steps", str(steps)), f"whole-{some}"
    spread = ("--moe.ep_size", "2", "--checkpoint.every", str(half))
    cases = {key: how for key, how in other_layouts().items() if (key[1] in SOME_LAYOUTS) == some}
    assert len(cases) == (5 if some else 32)
    begun = quick.folder / whole / "checkpoints" / f"step_{half:08d}"
    copies = [[str(begun), str(quick.folder / name / "checkpoints" / begun.name)] for _, name in cases]
    first: dict[str, Any] = {
        whole: [*resumable(quick, whole, 4, stage=3, extra=spread), *length], "copies": {"copy": copies}
    }  # fmt: skip
    for world_size in (4, 2, 1):
        argvs = {
            name: [*resumable(quick, name, world_size, **dict(how)), "--resume", "must", *length]
            for (ranks, name), how in cases.items()
            if ranks == world_size
        }
        quick.run(world_size, first | argvs)
        first = {}
    expected = quick.curve(whole)
    assert len(expected) == steps
    assert_same({name: quick.curve(name) for _, name in cases}, expected[half:])


def largest_difference(mine: Curve, other: Curve) -> float:
    """Of the losses of the second half."""
    return max(abs(a[0] - b[0]) for a, b in zip(mine[HALF:], other[HALF:], strict=True))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_8bit_moments_and_another_precision_open_anywhere(runs: Runs) -> None:
    """Blocks of 256 moments are cut elsewhere under another layout, and so are rounded once more. That, and a change
    between the optimizers or precisions, moves the losses by no more than training with the coarser one throughout.
    """
    spread, eight, bf16 = (
        ("--moe.ep_size", "2", "--checkpoint.every", str(HALF)),
        ("--optim.name", "adamw8bit"),
        ("bf16.enabled=true",),
    )
    whole = {
        "exact": resumable(runs, "exact", 4, stage=3, extra=spread),
        "8bit": resumable(runs, "8bit", 4, stage=3, extra=(*spread, *eight)),
        "bf16": resumable(runs, "bf16", 4, stage=3, extra=spread, ds=bf16),
    }
    runs.run(4, whole)
    cases: dict[str, tuple[str, str, dict[str, object]]] = {
        "8bit-zero1": ("8bit", "8bit", {"stage": 1, "extra": eight}),
        "8bit-zero3-ep2": ("8bit", "8bit", {"stage": 3, "extra": (*eight, "--moe.ep_size", "2")}),
        "8bit-into-exact": ("8bit", "8bit", {"stage": 2}),
        "exact-into-8bit": ("exact", "8bit", {"stage": 3, "extra": eight}),
        "exact-into-bf16": ("exact", "bf16", {"stage": 3, "ds": bf16}),
        "bf16-into-exact": ("bf16", "bf16", {"stage": 1}),
    }
    argvs = {}
    for name, (source, _, how) in cases.items():
        start_from(runs.folder / source, HALF, runs.folder / name)
        argvs[name] = [*resumable(runs, name, 2, **how), "--resume", "must"]
    runs.run(2, argvs)
    for name, (source, coarser, _) in cases.items():
        off = largest_difference(runs.curve(name), runs.curve(source))
        allowed = largest_difference(runs.curve(coarser), runs.curve("exact"))
        print(f"{name}: {off:.2e}, {coarser} throughout: {allowed:.2e}")
        assert 0 < off <= allowed, name


def start_from(run: Path, step: int, into: Path) -> None:
    """A run's folder as it was when it had made so many steps."""
    name = f"step_{step:08d}"
    shutil.copytree(run / "checkpoints" / name, into / "checkpoints" / name, copy_function=os.link)
    shutil.copy(run / "metrics.jsonl", into)
