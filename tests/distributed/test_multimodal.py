"""Texts and images on two ranks: the loss over all of their rows, adapters beside a sharded base, many experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_scale.models.lora import load_adapters, num_adapter_params
from moe_scale.models.text_image import TextImageModel
from tests.distributed.multimodal_cases import DENSE, LORA, MANY, WITHOUT_FUSION, replace
from tests.ranks import run_ranks
from tests.unit.models.test_text_image import SMALL, batch

WORKER = str(Path(__file__).with_name("multimodal_cases.py"))
DS_JSON = {"train_micro_batch_size_per_gpu": 6, "gradient_clipping": 0.0, "zero_optimization": {"stage": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks found, of a batch with an image that both have and a row that is not there."""
    path = tmp_path_factory.mktemp("multimodal")
    given = batch(12)
    present = torch.ones(12, dtype=torch.bool)
    present[4] = False
    items = torch.tensor([0, 1, 2, 3, -1, 5, 6, 0, 2, 9, 10, 6])
    torch.save(tuple(given._replace(present_B=present, items_B=items)), path / "inputs.pt")
    (path / "ds.json").write_text(json.dumps(DS_JSON))
    run_ranks(2, [WORKER, str(path)], timeout=200)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found2.json").read_text())


def test_two_ranks_have_the_loss_and_the_gradients_of_their_batches_joined(folder: Path) -> None:
    joined = torch.load(folder / "joined2.pt")
    model = TextImageModel(WITHOUT_FUSION, DENSE, seed=3).eval()
    loss = model(*torch.load(folder / "inputs.pt")).loss
    loss.backward()
    torch.testing.assert_close(joined["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(joined["grads"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert float(joined["grads"]["temperature.log_scale"].abs()) > 1e-3


@pytest.mark.parametrize("case", ["lora", "lora-ep2"])
def test_adapters_are_trained_and_the_base_stays_to_the_bit(found: dict[str, Any], case: str) -> None:
    of = found[case]
    assert of["sharded"]
    assert of["changed"] == of["trained"]
    assert all(".lora_" in name or name.startswith("match.") for name in of["trained"])
    assert of["losses"][-1] != of["losses"][0]


@pytest.mark.parametrize("case", ["lora", "lora-ep2"])
def test_the_optimizer_has_a_state_for_what_is_trained_alone(found: dict[str, Any], case: str) -> None:
    of = found[case]
    assert set(of["masters"]) <= set(of["trained"])
    assert of["numel"] == of["expected"]
    plain = TextImageModel(SMALL, replace(MANY, num_experts=4, ep_size=1))
    head = sum(p.numel() for p in plain.match.parameters())
    assert of["expected"] == num_adapter_params(plain, LORA) + head


@pytest.mark.parametrize("ep_size", [1, 2])
def test_adapters_saved_by_ranks_are_those_of_the_sharded_model(folder: Path, ep_size: int) -> None:
    model = TextImageModel(SMALL, replace(MANY, num_experts=4, ep_size=1), seed=3)
    load_adapters(model, folder / f"adapter{ep_size}")
    features = torch.cat([torch.load(folder / f"features{ep_size}_{rank}.pt") for rank in range(2)])
    out = model.eval()(*torch.load(folder / "inputs.pt"))
    torch.testing.assert_close(features, out.image_BE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["noisy", "top2"])
def test_256_experts_on_two_ranks_train(found: dict[str, Any], gate: str) -> None:
    of = found[gate]
    assert of["experts"] == [128], "half of them a rank"
    assert of["counted"] == 256
    assert min(of["losses"][-3:]) < 0.9 * of["losses"][0]
