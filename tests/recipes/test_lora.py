"""``lm_16l`` with adapters on two ranks: beside the base that a run left, with and without expert parallelism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_scale.checkpoint.index import MOMENTS, read_index
from moe_scale.checkpoint.reader import load_model
from moe_scale.cli import main
from moe_scale.errors import ConfigError
from moe_scale.models.lora import adapters, load_adapters, num_adapter_params
from moe_scale.tools.stored_run import LM, open_run
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE
from tests.hf import assert_same_model, ours, theirs
from tests.ranks import REPO, run_ranks
from tests.recipes.conftest import TINY, records

TRAIN_CASES = str(REPO / "tests" / "distributed" / "train_cases.py")
LORA = ["--lora.rank", "2", "--lora.targets", "attention.*", "router", "experts.*", "dense.*", "--optim.lr", "0.01"]
RUNS = ("ep1", "ep2")
IDS_BS = torch.arange(30).view(2, 15) * 7


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lora")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "ds.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}})
    )
    tiny = ["--config", str(folder / "tiny.yaml"), "--deepspeed_config", str(folder / "ds.json")]
    return [*tiny, "--data.tokenizer", "bytes", "--model.vocab_size", "264", "--moe.shared_intermediate_size", "8"]


@pytest.fixture(scope="module")
def runs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters beside it: with every expert on each rank; with half of them after the first two steps; and
    in bf16."""
    folder = tmp_path_factory.mktemp("runs")
    beside = [*flags, *LORA, "--model.pretrained", str(folder / "base")]
    ep2 = [*beside, "--moe.ep_size", "2", "--output_dir", str(folder / "ep2"), "--optim.schedule", "constant"]
    cases = [
        [*flags, "--output_dir", str(folder / "base")],
        [*beside, "--output_dir", str(folder / "ep1"), "--optim.schedule", "constant"],
        [*ep2, "--moe.ep_size", "1", "--max_steps", "2"],
        [*ep2, "--resume", "must"],
        [*ep2, "--output_dir", str(folder / "bf16"), "--deepspeed_override", "bf16.enabled=true"],
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(2, [TRAIN_CASES, str(folder / "cases.json")], timeout=280)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(run).named_parameters())


@pytest.mark.parametrize("run", RUNS)
def test_the_base_stays_to_the_bit_and_the_adapters_are_trained(runs: Path, run: str) -> None:
    base, adapted = weights(runs / "base"), weights(runs / run)
    added = adapted.keys() - base.keys()
    assert base.keys() <= adapted.keys()
    assert all(".lora_" in name for name in added)
    assert [name for name in base if not torch.equal(adapted[name], base[name])] == []
    of_b = [adapted[name] for name in added if name.endswith((".B", "lora_B.weight"))]
    assert len(of_b) == 2 * (3 + 1 + 2 + 2)
    assert all(b.any() for b in of_b)
    losses = [r["loss"] for r in records(runs / run) if "loss" in r]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("run", RUNS)
def test_the_formula_counts_what_the_optimizer_has_a_state_of(runs: Path, run: str) -> None:
    config = open_run(str(runs / run), LM).config
    d_model, inner, hidden, num_experts, rank = 32, 32, 16, 4, 2
    attention = (d_model + inner + 2 * 16) + (inner + d_model) + (d_model + inner)
    an_expert = (d_model + 2 * hidden) + (hidden + d_model)
    dense = (d_model + 2 * 8) + (8 + d_model)
    formula = 2 * rank * (attention + (d_model + num_experts) + num_experts * an_expert + dense)
    assert num_adapter_params(load_model(runs / "base"), config.lora) == formula
    index = read_index(max((runs / run / "checkpoints").glob("step_*")))
    trained = {name: tensor for name, tensor in index.tensors.items() if MOMENTS[0] in tensor.states}
    assert all(".lora_" in name for name in trained)
    assert sum(tensor.numel for tensor in trained.values()) == formula


def test_bf16_rounds_the_base_once_and_not_the_adapters(runs: Path) -> None:
    base, adapted = weights(runs / "base"), weights(runs / "bf16")
    assert all(torch.equal(adapted[name], base[name].bfloat16().float()) for name in base)
    name = "layers.0.moe.experts.lora_gate_up.B"
    assert not torch.equal(adapted[name], adapted[name].bfloat16().float())
    losses = [[r["loss"] for r in records(runs / run) if "loss" in r] for run in ("ep1", "bf16")]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


def test_expert_parallelism_and_a_resume_change_nothing(runs: Path) -> None:
    losses = [[r["loss"] for r in records(runs / run) if "loss" in r] for run in RUNS]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    ep1, ep2 = (weights(runs / run) for run in RUNS)
    for name in ep1:
        torch.testing.assert_close(ep2[name], ep1[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("run", RUNS)
def test_the_adapters_alone_make_the_model_of_the_base(runs: Path, run: str) -> None:
    model: Any = load_model(runs / "base")
    config = load_adapters(model, runs / run / "adapters")
    assert config.rank == 2
    torch.testing.assert_close(model(IDS_BS), load_model(runs / run)(IDS_BS), rtol=1e-6, atol=1e-6)
    said = json.loads((runs / run / "adapters" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(runs / "base")
    assert "layers.1.moe.experts.gate_up" in said["target_parameters"]


def test_export_merges_and_generate_uses_them(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(runs / "ep2"), "--output_dir", str(tmp_path / "exported")])
    assert_same_model(ours(runs / "ep2"), theirs(tmp_path / "exported"), new_tokens=8)
    base, adapted = load_model(runs / "base"), load_model(runs / "ep2")
    assert adapters(adapted)
    assert (base(IDS_BS) - adapted(IDS_BS)).abs().max() > 1e-2
    capsys.readouterr()
    main(["generate", "--run", str(runs / "ep2"), "--prompt", "ROMEO", "--max_tokens", "4"])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--moe.router", "sigmoid"], r"moe.bias_update_rate: 0.001 with lora.rank = 2"),
        (["--moe.backend", "deepspeed"], r"moe.backend: deepspeed with lora.rank = 2.*use moe.backend custom"),
        (["--lora.targets", "q_proj"], r"lora.targets: 'q_proj' is the name of no linear layer.*gate_up"),
        (["--model.pretrained", "{runs}/ep1"], r"was trained with adapters"),
        (["--resume", "must", "--lora.rank", "4", "--max_steps", "9"], r"lora.rank: .* was saved with 2"),
    ],
)
def test_what_has_no_meaning_is_refused(runs: Path, tmp_path: Path, more: list[str], says: str) -> None:
    begun = json.loads((runs / "cases.json").read_text())[1]
    folder = runs / "ep1" if "--resume" in more else tmp_path
    with pytest.raises(ConfigError, match=says):
        prepare_job(RECIPE, [*begun, *(word.format(runs=runs) for word in more), "--output_dir", str(folder)])


def test_a_model_of_drawn_weights_is_remarked_upon(flags: list[str], tmp_path: Path) -> None:
    config = prepare_job(RECIPE, [*flags, *LORA, "--output_dir", str(tmp_path)]).config
    assert any("set model.pretrained" in remark for remark in config.remarks())
