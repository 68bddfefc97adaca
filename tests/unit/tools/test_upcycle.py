"""Upcycled models against the dense ones that they come from: the same loss at first, and experts that learn apart.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_scale.cli import main
from moe_scale.train.recipe import prepare_job
from recipes.lm_16l import RECIPE
from tests.hf import model_folder, ours

DENSE = {"enabled": False, "intermediate_size": 12, "top_k": 2}  # feed-forwards of 24
CASES = {
    "two of eight copies": (["--num_experts", "8"], 1),
    "four of four copies": (["--num_experts", "4", "--top_k", "4"], 1),
    "halves": (["--num_experts", "8", "--granularity", "2"], 2),
    "halves of two copies": (["--num_experts", "8", "--granularity", "2", "--top_k", "4"], 2),
    "eighths": (["--num_experts", "16", "--granularity", "8"], 8),
    "one copy in thirds": (["--num_experts", "3", "--granularity", "3"], 3),
    "every second layer": (["--num_experts", "8", "--granularity", "4", "--every", "2"], 4),
}


def upcycled(dense: Path, target: Path, *flags: str) -> Path:
    main(["upcycle", str(dense), "--output_dir", str(target), *flags])
    return target


@pytest.mark.parametrize("gate", ["none", "elementwise"])
@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_is_that_of_the_dense_model(case: str, gate: str, tmp_path: Path) -> None:
    flags, granularity = CASES[case]
    dense = model_folder(tmp_path / "dense", {"attention_gate": gate, "num_layers": 4}, DENSE)
    sparse = upcycled(dense, tmp_path / "sparse", *flags)
    before, after = ours(dense), ours(sparse)
    assert after.moe_config.intermediate_size == 24 // granularity
    ids_BS = torch.randint(260, (3, 33), generator=torch.Generator().manual_seed(0))
    inputs_BS, targets_BS = ids_BS[:, :-1], ids_BS[:, 1:]
    torch.testing.assert_close(after(inputs_BS), before(inputs_BS), rtol=1e-4, atol=1e-4)
    expected, found = before(inputs_BS, targets_BS), after(inputs_BS, targets_BS)
    assert abs(found.lm_loss - expected.lm_loss) < 1e-4
    loads_E = found.moe.assignments_E[0]
    assert int((loads_E > 0).sum()) == len(loads_E), "every expert has tokens, so that all can learn"
    found.loss.backward()
    experts = after.layers[-1].moe.experts
    for parameter in experts.parameters():
        gradients = parameter.grad.flatten(1)
        apart = (gradients[:, None] - gradients[None]).abs().amax(dim=-1) + torch.eye(len(gradients))
        assert float(apart.min()) > 0, "no two experts learn the same"


def test_what_it_leaves_begins_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = model_folder(tmp_path / "dense", {}, DENSE)
    sparse = upcycled(dense, tmp_path / "sparse", "--num_experts", "8")
    assert "8 experts of 24, 2 a token" in capsys.readouterr().out
    assert json.loads((sparse / "run.json").read_text())["origin"]["granularity"] == 1
    job = prepare_job(RECIPE, ["--config", str(sparse / "settings.yaml"), "--output_dir", str(tmp_path / "run")])
    assert job.remarks == ()
    assert job.config.moe.num_experts == 8
    main(["export", str(sparse), "--output_dir", str(tmp_path / "exported")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_experts 4 --top_k 1", "--top_k: 1: a single expert"),
        ("--num_experts 9 --granularity 2 --top_k 3", "--num_experts: 9 is no multiple of --granularity = 2"),
        ("--num_experts 9 --granularity 2 --top_k 3", "--top_k: 3 is no multiple"),
        ("--num_experts 10 --granularity 5", "5 does not divide the feed-forward's hidden width of 24"),
        ("--num_experts 2 --top_k 4", "--top_k: 4 > --num_experts = 2"),
        ("--num_experts 4 --every 3", "--every: 3 > 2 layers"),
        ("--num_experts 8 --every 2 --granularity 2 --top_k 4", "--top_k equal to --granularity"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = model_folder(tmp_path / "dense", {}, DENSE)
    with pytest.raises(SystemExit) as left:
        upcycled(dense, tmp_path / "sparse", *flags.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("moe", [{}, {"shared_intermediate_size": 4}])
def test_a_model_with_experts_is_refused(
    moe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = model_folder(tmp_path / "sparse", {}, moe)
    with pytest.raises(SystemExit):
        upcycled(sparse, tmp_path / "more", "--num_experts", "4")
    assert "has experts already" in capsys.readouterr().err
