"""The DeepSpeed JSON: what is refused, what is completed, and that the files of this repository fit their scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_scale.config import LMConfig, MoEConfig, OptimConfig
from moe_scale.parallel.device import Device
from moe_scale.parallel.ds_json import DeepSpeedPlan, plan
from moe_scale.parallel.launch import Launch

ROOT = Path(__file__).resolve().parents[3]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
CPU = Device("cpu", "some CPU", bf16=True, fp16=True)
GPU = Device("cuda", "some GPU", bf16=True, fp16=True)
OLD_GPU = Device("cuda", "some old GPU", bf16=False, fp16=True)
NO_FP16 = Device("cpu", "some old CPU", bf16=True, fp16=False)
GOOD = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def launch(world_size: int) -> Launch:
    return Launch(0, world_size, 0, min(world_size, 8), "env" if world_size > 1 else "none")


class Planner:
    """Writes a JSON file and plans a run with it."""

    def __init__(self, folder: Path):
        self.file = folder / "ds.json"

    def __call__(
        self, content: Any = GOOD, *overrides: str, ranks: int = 1, device: Device = CPU, **config: Any
    ) -> tuple[DeepSpeedPlan, list[str]]:
        text = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        self.file.write_bytes(text)
        run = LMConfig(deepspeed_config=str(self.file), deepspeed_override=overrides, **config)
        made, problems = plan(run, launch(ranks), device)
        return made, [str(problem) for problem in problems]


@pytest.fixture
def planned(tmp_path: Path) -> Planner:
    return Planner(tmp_path)


def test_a_good_file(planned: Planner) -> None:
    made, problems = planned(GOOD, ranks=2)
    assert problems == []
    assert (made.stage, made.micro_batch, made.grad_accum, made.precision, made.offload) == (3, 4, 1, "bf16", False)
    assert made.json["train_batch_size"] == 8
    assert made.json["gradient_clipping"] == 1.0
    assert "optimizer" not in made.json
    assert json.loads(planned.file.read_text()) == GOOD, "the file itself is not touched"


@pytest.mark.parametrize("file", DS_CONFIGS, ids=lambda file: file.stem)
def test_every_file_of_the_repository_fits_its_scale(file: Path) -> None:
    ranks = {"cpu": (1, 2), "1gpu": (1,), "1node": (1, 2, 4, 8), "multinode": (8, 16, 32, 64)}
    scale = next(scale for scale in ranks if f"_{scale}" in file.stem)
    for world_size in ranks[scale]:
        made, problems = plan(LMConfig(deepspeed_config=str(file)), launch(world_size), CPU if scale == "cpu" else GPU)
        assert problems == []
        assert file.stem.startswith(f"zero{made.stage}_")
        assert made.precision == next((p for p in ("fp16", "fp32") if p in file.stem), "bf16")
        assert made.offload == ("offload" in file.stem)


def test_there_is_a_file_to_test() -> None:
    assert DS_CONFIGS


# --- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "is not valid JSON"),
        ("{,}", "is not valid JSON"),
        ('{"a": 1,}', "is not valid JSON"),
        ("// comment\n{}", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        ("[]", "holds a list; it must hold an object"),
        ("3", "it must hold an object"),
        ("null", "it must hold an object"),
        ("[" * 100_000, "cannot read"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "'train_batch_size' is given twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' is given twice"),
    ],
)
def test_unreadable_content(planned: Planner, content: str | bytes, what: str) -> None:
    _, (found,) = planned(content)
    assert found.startswith("deepspeed_config: ")
    assert what in found


@pytest.mark.parametrize("name", ["", ".", "no such file.json", "~nobody-has-this-name/x.json", "a" * 300, "a\0b"])
def test_unreadable_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, problems = plan(LMConfig(deepspeed_config=name, deepspeed_override=("x",)), launch(1), CPU)
    (found,) = problems
    assert found.where == "deepspeed_config"
    assert name in found.what or not name


def test_a_byte_order_mark_is_no_problem(planned: Planner) -> None:
    assert planned(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())[1] == []


# --- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "instead"),
    [("optimizer", "--optim.name"), ("scheduler", "--optim.schedule"), ("expert_parallel", "--moe.ep_size"),
     ("tensorboard", "--telemetry.tensorboard"), ("wandb", "--telemetry.wandb")],
)  # fmt: skip
def test_sections_that_the_run_owns(planned: Planner, section: str, instead: str) -> None:
    _, (found,) = planned(GOOD | {section: {}})
    assert found.startswith(f"deepspeed_config: {section}: ")
    assert instead in found


@pytest.mark.parametrize(
    ("key", "hint"),
    [("zero_optimisation", "zero_optimization"), ("train_micro_batch_size_per_cpu", "train_micro_batch_size_per_gpu"),
     ("fp61", "fp16"), ("qqq", None)],
)  # fmt: skip
def test_unknown_keys(planned: Planner, key: str, hint: str | None) -> None:
    _, (found,) = planned(GOOD | {key: {}})
    assert found == f"deepspeed_config: {key}: unknown key; " + (f"did you mean {hint}?" if hint else "remove it")


WRONG_VALUES = [
    ("zero_optimization.stage", [4, -1, True, 3.0, "3", None, [], {}], "choose 0, 1, 2 or 3"),
    ("zero_optimization", [3, None, "x", [1]], "it must be an object"),
    ("bf16", [True, None, 1], "it must be an object"),
    ("fp16", [False], "it must be an object"),
    ("flops_profiler", [True], "it must be an object"),
    ("bf16.enabled", ["False", "auto", 1, None, {}], "choose true or false"),
    ("bf16.enable", [True], "unknown key"),
    ("fp16.scale", [1], "unknown key"),
    ("gradient_clipping", ["abc", -1, None, True, float("nan"), float("inf")], "it must be a number from 0"),
    ("steps_per_print", [0, "often"], "it must be a number from 1"),
    ("wall_clock_breakdown", ["yes", 1, None], "choose true or false"),
    ("communication_data_type", ["fp64", 16, [], None], "choose fp32, bf16 or fp16"),
    ("train_micro_batch_size_per_gpu", [0, -1, "auto", 1.0, True, []], "it must be a whole number from 1"),
    ("gradient_accumulation_steps", [0, "auto"], "it must be a whole number from 1"),
    ("train_batch_size", [0, "8"], "it must be a whole number from 1"),
    ("zero_optimization.stag", [3], "unknown key"),
    ("zero_optimization.reduce_bucket_size", [-3, "big"], "should be"),
    ("zero_optimization.overlap_comm", ["maybe"], "should be"),
    ("zero_optimization.offload_optimizer", ["cpu"], "should be"),
    ("zero_optimization.offload_optimizer.device", ["disk"], "should be 'none', 'cpu' or 'nvme'"),
    ("zero_optimization.zero_hpz_partition_size", ["abc"], "should be"),
]


@pytest.mark.parametrize(
    ("path", "value", "allowed"), [(path, value, allowed) for path, values, allowed in WRONG_VALUES for value in values]
)
def test_wrong_values(planned: Planner, path: str, value: Any, allowed: str) -> None:
    content = json.loads(json.dumps(GOOD))
    *sections, name = path.split(".")
    node = content
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    _, (found,) = planned(content)
    assert found.startswith(f"deepspeed_config: {path}: ")
    assert allowed in found
    _, (by_override,) = planned(GOOD, f"{path}={json.dumps(value)}")
    assert by_override == found


def test_one_precision_at_most(planned: Planner) -> None:
    _, (found,) = planned(GOOD | {"fp16": {"enabled": True}})
    assert "both are enabled" in found
    made, problems = planned(GOOD | {"bf16": {"enabled": False}, "fp16": {"enabled": True}})
    assert (made.precision, problems) == ("fp16", [])
    made, problems = planned({k: v for k, v in GOOD.items() if k != "bf16"})
    assert (made.precision, problems) == ("fp32", [])


def test_precision_of_the_device(planned: Planner) -> None:
    _, (found,) = planned(GOOD, device=OLD_GPU)
    assert found == "deepspeed_config: bf16.enabled: some old GPU has no bf16; use fp16, or none for fp32"
    _, (found,) = planned(GOOD | {"bf16": {}, "fp16": {"enabled": True}}, device=NO_FP16)
    assert found == "deepspeed_config: fp16.enabled: some old CPU has no fp16; use bf16, or none for fp32"


def test_everything_at_once(planned: Planner) -> None:
    content = {
        "optimizer": {}, "zero_optimisation": {}, "bf16": {"enabled": 1}, "zero_optimization": {"stage": 7, "x": 1},
        "gradient_clipping": -1, "train_batch_size": "many",
    }  # fmt: skip
    _, problems = planned(content, "oops", ranks=2, moe=MoEConfig(num_experts=9, ep_size=3))
    where = [problem.rsplit(": ", 1)[0] for problem in problems]
    assert len(where) == len(set(problems)) == 9


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides(planned: Planner) -> None:
    made, problems = planned(
        GOOD, "zero_optimization.stage=2", "train_micro_batch_size_per_gpu=2", "bf16.enabled=false",
        "zero_optimization.offload_optimizer.device=cpu", "flops_profiler.output_file=a=b.txt",
        "train_micro_batch_size_per_gpu=3",
    )  # fmt: skip
    assert problems == []
    assert (made.stage, made.micro_batch, made.precision, made.offload) == (2, 3, "fp32", True)
    assert made.json["flops_profiler"]["output_file"] == "a=b.txt"
    assert made.json["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("item", ["stage", "=3", "", ".=1", "a..b=1", "zero_optimization.=1", ".stage=1"])
def test_overrides_that_are_none(planned: Planner, item: str) -> None:
    _, (found,) = planned(GOOD, item)
    assert found == f"deepspeed_override: {item!r}; write key=value, as zero_optimization.stage=2"


def test_overrides_below_a_value(planned: Planner) -> None:
    _, (found,) = planned(GOOD, "zero_optimization.stage.x=1")
    assert found == "deepspeed_override: 'zero_optimization.stage.x=1': stage is not a section"


KEYS = st.sampled_from(["zero_optimization.stage", "bf16", "bf16.enabled", "x", "train_batch_size"]) | st.text(
    max_size=5
)
VALUES = st.text(max_size=8) | st.sampled_from(["[" * 5000, "{}", "1e999", "null"])


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(KEYS, VALUES), max_size=3))
def test_any_override(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    planned = Planner(tmp_path_factory.getbasetemp())
    made, problems = planned(GOOD, *(f"{key}={value}" for key, value in pairs))
    assert made.stage in range(4)
    assert all(problem.startswith("deepspeed_") for problem in problems)


# --- batch arithmetic ------------------------------------------------------------------------------------------------

SIZES = st.none() | st.integers(1, 64)


@settings(max_examples=200, deadline=None)
@given(total=SIZES, micro=SIZES, accum=SIZES, ranks=st.integers(1, 16))
def test_batch(
    tmp_path_factory: pytest.TempPathFactory, total: int | None, micro: int | None, accum: int | None, ranks: int
) -> None:
    planned = Planner(tmp_path_factory.getbasetemp())
    given_sizes = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accum,
    }
    made, problems = planned({key: size for key, size in given_sizes.items() if size is not None}, ranks=ranks)
    possible = [
        (m, a)
        for m in ([micro] if micro else range(1, 65))
        for a in ([accum] if accum else range(1, 65))
        if (total is None or m * a * ranks == total)
    ]
    if total is None and micro is None:
        assert problems == [
            "deepspeed_config: train_micro_batch_size_per_gpu: not given; sequences per rank and forward pass"
        ]
    elif not possible:
        (found,) = problems
        assert found.startswith(f"deepspeed_config: train_batch_size: {total} != ")
    else:
        assert problems == []
        assert (made.micro_batch, made.grad_accum) in possible
        assert accum is not None or total is not None or made.grad_accum == 1
        assert made.json["train_batch_size"] == made.micro_batch * made.grad_accum * ranks
        assert made.json["train_micro_batch_size_per_gpu"] == made.micro_batch
        assert made.json["gradient_accumulation_steps"] == made.grad_accum


def test_completed_settings(planned: Planner) -> None:
    made, _ = planned(GOOD | {"gradient_clipping": 0.0, "steps_per_print": 5}, optim=OptimConfig(name="adamw8bit"))
    assert made.json["gradient_clipping"] == 0.0
    assert made.json["steps_per_print"] == 5
    assert made.json["zero_allow_untested_optimizer"] is True
