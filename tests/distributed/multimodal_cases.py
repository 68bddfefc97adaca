"""One rank that trains models of texts and images under ZeRO-3: ``multimodal_cases.py FOLDER``.

FOLDER holds ``inputs.pt``, a batch to be shared among the ranks, and gets from rank 0 what each case found. The cases
share one start, because importing torch and DeepSpeed costs more than all of them together.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from moe_scale.config import LoRAConfig, MoEConfig, MultimodalConfig, OptimConfig
from moe_scale.data.images.batches import ImageTextBatch
from moe_scale.models.lora import adapters, add_adapters, save_adapters
from moe_scale.models.text_image import TextImageModel
from moe_scale.parallel import device, zero, zero_state
from moe_scale.parallel import launch as launches
from moe_scale.parallel.collectives import mean_over_ranks
from moe_scale.parallel.ds_json import plan
from moe_scale.telemetry.quiet import quiet
from moe_scale.train.engine import build_engine
from tests.unit.models.test_text_image import SMALL

DENSE = MoEConfig(enabled=False, num_experts=4, top_k=2, intermediate_size=16)
MANY = MoEConfig(num_experts=256, top_k=2, intermediate_size=4, ep_size=2)
LORA = LoRAConfig(rank=2, alpha=8.0, targets=("*_proj", "query", "router"), also_trained=("match",))
WITHOUT_FUSION = replace(SMALL, fusion_layers=0)
"""Hard negatives are drawn by each rank, so that only this one is the same on any number of ranks."""


def config_of(model: Any, moe: MoEConfig, folder: Path, lora: LoRAConfig | None = None) -> MultimodalConfig:
    return MultimodalConfig(
        model=model,
        moe=moe,
        lora=lora or LoRAConfig(),
        deepspeed_config=str(folder / "ds.json"),
        optim=OptimConfig(lr=0.01, warmup_steps=0, schedule="constant"),
    )


def engine_of(config: MultimodalConfig) -> Any:
    found = device.detect()
    ds_plan, problems = plan(config, launches.detect(), found)
    assert not problems, problems
    groups = zero.make_groups(config.moe.ep_size)

    def build() -> nn.Module:
        model = TextImageModel(config.model, config.moe, groups, seed=3)
        if config.lora.enabled:
            add_adapters(model, config.lora)
        return model

    return build_engine(build, config, ds_plan, found)


def mine(batch: ImageTextBatch) -> ImageTextBatch:
    """This rank's rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return ImageTextBatch(*(None if part is None else part.chunk(ranks)[rank] for part in batch))


def joined_loss(batch: ImageTextBatch, folder: Path) -> dict[str, Any]:
    """The loss and every gradient as the optimizer is about to see them."""
    engine = engine_of(config_of(WITHOUT_FUSION, DENSE, folder))
    engine.eval()
    out = engine(*mine(batch))
    engine.backward(out.loss)
    grads = {name: safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    found = {"loss": mean_over_ranks(out.loss.detach()), "grads": grads}
    engine.destroy()
    return found


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: zero.full_values(parameter) for name, parameter in model.named_parameters()}


def train(engine: Any, batch: ImageTextBatch, steps: int) -> list[float]:
    torch.manual_seed(5 + dist.get_rank())
    losses = []
    for _ in range(steps):
        out = engine(*mine(batch))
        engine.backward(out.loss)
        engine.step()
        losses.append(float(mean_over_ranks(out.lm_loss)))
    return losses


def adapters_alone(batch: ImageTextBatch, folder: Path, moe: MoEConfig) -> dict[str, Any]:
    """What changes when adapters are trained, and what state the optimizer has."""
    engine = engine_of(config_of(SMALL, moe, folder, LORA))
    before = values_of(engine.module)
    losses = train(engine, batch, 3)
    after = values_of(engine.module)
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    masters = [held for held in zero_state.held_state(engine) if held.master is not None]
    numel = torch.tensor([sum(held.length for held in masters)])
    dist.all_reduce(numel)
    found = {
        "losses": losses,
        "changed": sorted(name for name in after if not torch.equal(after[name], before[name])),
        "trained": sorted(trained),
        "sharded": all(hasattr(parameter, "ds_tensor") for parameter in engine.module.parameters()),
        "masters": sorted({held.name for held in masters}),
        "numel": int(numel),
        "expected": sum(before[name].numel() for name in trained),
        "layers": len(adapters(engine.module)),
    }
    save_adapters(engine.module, LORA, folder / f"adapter{moe.ep_size}", write=dist.get_rank() == 0)
    engine.eval()
    out = engine(*mine(batch))
    torch.save(out.image_BE.detach(), folder / f"features{moe.ep_size}_{dist.get_rank()}.pt")
    engine.destroy()
    return found


def many_experts(batch: ImageTextBatch, folder: Path, router: str) -> dict[str, Any]:
    engine = engine_of(config_of(SMALL, replace(MANY, router=router), folder))
    losses = train(engine, batch, 12)
    experts = {zero.full_shape(p)[0] for name, p in engine.module.named_parameters() if ".experts." in name}
    used = engine(*mine(batch)).moe.assignments_E
    engine.destroy()
    return {"losses": losses, "experts": sorted(experts), "counted": used.shape[1]}


def main() -> None:
    quiet()
    zero.init_distributed(timeout_minutes=2)
    folder = Path(sys.argv[1])
    batch: ImageTextBatch = ImageTextBatch(*torch.load(folder / "inputs.pt"))
    found = {"lora": adapters_alone(batch, folder, replace(MANY, num_experts=4, ep_size=1))}
    joined = joined_loss(batch, folder)
    if dist.get_world_size() > 1:
        found["lora-ep2"] = adapters_alone(batch, folder, replace(MANY, num_experts=4))
        found["noisy"] = many_experts(batch, folder, "noisy")
        found["top2"] = many_experts(batch, folder, "softmax")
    if dist.get_rank() == 0:
        torch.save(joined, folder / f"joined{dist.get_world_size()}.pt")
        (folder / f"found{dist.get_world_size()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
