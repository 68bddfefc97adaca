"""What only a GPU can show of the layer: that it computes what a CPU computes, and that the host never waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.decoder import DecoderLM, LMOutput
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUTERS = ["softmax", "noisy", "sigmoid", "hash"]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make every synchronization of the host with the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(router: str, dtype: torch.dtype) -> tuple[MoELayer, Tensor, Tensor]:
    config = MoEConfig(num_experts=8, top_k=2, intermediate_size=64, router=router)  # type: ignore[arg-type]
    layer = MoELayer(config, 128, ParallelGroups(), Init(0)).to("cuda", dtype).eval()
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(2, 96, 128, generator=generator).to("cuda", dtype)
    ids_BS = torch.randint(0, 50257, (2, 96), generator=generator).to("cuda")
    return layer, x_BSD, ids_BS


@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_layer_agrees_with_fp32_on_the_cpu(router: str) -> None:
    layer, x_BSD, ids_BS = make(router, torch.bfloat16)
    x_BSD.requires_grad_()
    y_BSD, stats = layer(x_BSD, None, ids_BS)
    (y_BSD.float().square().mean() + stats.aux_loss).backward()
    gradient = x_BSD.grad
    reference = layer.to("cpu", torch.float32)
    reference.zero_grad()
    x_cpu = x_BSD.detach().float().cpu().requires_grad_()
    expected, expected_stats = reference(x_cpu, None, ids_BS.cpu())
    (expected.square().mean() + expected_stats.aux_loss).backward()
    # A token whose two best experts are within rounding of each other may go to another one: compare the bulk.
    close = torch.isclose(y_BSD.float().cpu(), expected, rtol=5e-2, atol=5e-2).float().mean()
    assert close > 0.99
    assert gradient is not None
    assert torch.isclose(gradient.float().cpu(), x_cpu.grad, rtol=1e-1, atol=1e-3).float().mean() > 0.98


@pytest.mark.parametrize("router", ROUTERS)
def test_the_host_never_waits_for_the_layer(router: str) -> None:
    layer, x_BSD, ids_BS = make(router, torch.bfloat16)
    layer.train()
    x_BSD.requires_grad_()
    layer(x_BSD, None, ids_BS)[0].sum().backward()  # warm up
    with no_waiting():
        y_BSD, stats = layer(x_BSD, None, ids_BS)
        (y_BSD.float().mean() + stats.aux_loss + stats.z_loss).backward()


def test_decoder_trains_on_the_device() -> None:
    config = DecoderConfig(vocab_size=512, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2)
    model = DecoderLM(config, MoEConfig(num_experts=8, intermediate_size=64)).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids_BS = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(0)).cuda()
    documents = (torch.arange(64, device="cuda") // 20).expand(4, 64)
    losses = []
    for _ in range(30):
        output = model(ids_BS[:, :-1], ids_BS[:, 1:].contiguous(), documents, padded=False)
        assert isinstance(output, LMOutput)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.lm_loss))
    assert losses[-1] < 0.5 * losses[0]
