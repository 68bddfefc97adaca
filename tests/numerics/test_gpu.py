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
from moe_scale.moe.dispatch import DispatchPlan
from moe_scale.moe.experts import Experts
from moe_scale.moe.layer import MoELayer
from moe_scale.parallel.groups import ParallelGroups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUTERS = ["softmax", "noisy", "sigmoid", "hash"]
KERNELS = ["torch", "triton"]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Make every synchronization of the host with the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(
    router: str, dtype: torch.dtype, kernels: str = "torch", dispatch: str = "dropless"
) -> tuple[MoELayer, Tensor, Tensor]:
    config = MoEConfig(
        num_experts=8,
        top_k=2,
        intermediate_size=64,
        router=router,
        kernels=kernels,
        dispatch=dispatch,  # type: ignore[arg-type]
    )
    layer = MoELayer(config, 128, ParallelGroups(), Init(0)).to("cuda", dtype).eval()
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(2, 96, 128, generator=generator).to("cuda", dtype)
    ids_BS = torch.randint(0, 50257, (2, 96), generator=generator).to("cuda")
    return layer, x_BSD, ids_BS


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_layer_agrees_with_fp32_on_the_cpu(router: str, kernels: str) -> None:
    layer, x_BSD, ids_BS = make(router, torch.bfloat16, kernels)
    x_BSD.requires_grad_()
    y_BSD, stats = layer(x_BSD, None, ids_BS)
    (y_BSD.float().square().mean() + stats.aux_loss).backward()
    gradient = x_BSD.grad
    reference = make(router, torch.float32)[0].to("cpu")
    reference.load_state_dict({name: value.float().cpu() for name, value in layer.state_dict().items()})
    x_cpu = x_BSD.detach().float().cpu().requires_grad_()
    expected, expected_stats = reference(x_cpu, None, ids_BS.cpu())
    (expected.square().mean() + expected_stats.aux_loss).backward()
    # A token whose two best experts are within rounding of each other may go to another one: compare the bulk.
    close = torch.isclose(y_BSD.float().cpu(), expected, rtol=5e-2, atol=5e-2).float().mean()
    assert close > 0.99
    assert gradient is not None
    assert torch.isclose(gradient.float().cpu(), x_cpu.grad, rtol=1e-1, atol=1e-3).float().mean() > 0.98


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_padding_and_drops_agree_with_fp32_on_the_cpu(dispatch: str, kernels: str) -> None:
    """The rows of no expert are not cut off on a GPU: neither they nor what they hold may reach a token or a weight."""
    layer, x_BSD, _ = make("softmax", torch.bfloat16, kernels, dispatch)
    valid_BS = torch.rand(2, 96, generator=torch.Generator().manual_seed(1)) < 0.7
    reference = make("softmax", torch.float32, dispatch=dispatch)[0].to("cpu")
    reference.load_state_dict({name: value.float().cpu() for name, value in layer.state_dict().items()})
    spoiled = torch.full((1 << 26,), float("nan"), device="cuda")
    del spoiled
    y_BSD = layer(x_BSD, valid_BS.cuda())[0]
    expected = reference(x_BSD.float().cpu(), valid_BS)[0]
    y_BSD.float().square().mean().backward()
    expected.square().mean().backward()
    assert torch.isclose(y_BSD.float().cpu(), expected, rtol=5e-2, atol=5e-2).float().mean() > 0.99
    for name, parameter in layer.named_parameters():
        ours, theirs = parameter.grad, reference.get_parameter(name).grad
        assert ours is not None
        assert theirs is not None
        assert (ours.float().cpu() - theirs).norm() / theirs.norm() < 0.1, name


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("dispatch", "padding"), [("dropless", False), ("capacity", False), ("dropless", True)])
def test_the_host_never_waits_for_the_layer(dispatch: str, padding: bool, router: str, kernels: str) -> None:
    layer, x_BSD, ids_BS = make(router, torch.bfloat16, kernels, dispatch)
    valid_BS = torch.rand(2, 96, device="cuda") < 0.7 if padding else None
    layer.train()
    x_BSD.requires_grad_()
    layer(x_BSD, valid_BS, ids_BS)[0].sum().backward()  # warm up
    with no_waiting():
        y_BSD, stats = layer(x_BSD, valid_BS, ids_BS)
        (y_BSD.float().mean() + stats.aux_loss + stats.z_loss).backward()


def run_experts(
    by: str, dtype: torch.dtype, counts: list[int], d_model: int, hidden: int, activation: str, *, exact: bool = False
) -> list[Tensor]:
    """Output and gradients (of tokens, routing weights and parameters) of tokens that each go to two experts.

    Args:
        counts: rows of each expert; their sum is even.
        exact: take the values that ``dtype`` has for the inputs, but compute on them in fp64, on the CPU.
    """
    device, precise = ("cpu", torch.float64) if exact else ("cuda", dtype)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(device, precise)

    config = MoEConfig(num_experts=len(counts), intermediate_size=hidden, activation=activation, kernels=by)  # type: ignore[arg-type]
    experts = Experts(config, d_model, ParallelGroups(), Init(0)).to(dtype).to(device, precise)
    generator = torch.Generator().manual_seed(0)
    num_rows = sum(counts)
    token_N = torch.cat([torch.randperm(num_rows // 2, generator=generator) for _ in range(2)])
    place_TK = token_N.argsort(stable=True).view(-1, 2)
    weight_N = torch.rand(num_rows, generator=generator).to(device).requires_grad_()
    x_TD = cast(torch.randn(num_rows // 2, d_model, generator=generator)).requires_grad_()
    grad_TD = cast(torch.randn(num_rows // 2, d_model, generator=generator))
    plan = DispatchPlan(
        token_N.to(device), torch.tensor(counts, device=device), weight_N, place_TK.to(device), torch.tensor(0)
    )
    y_TD = experts(x_TD, plan.counts_E, plan)
    return [y_TD, *torch.autograd.grad(y_TD, [x_TD, weight_N, experts.gate_up, experts.down], grad_TD)]


TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MANY = [300, 0, 7, 129, 128, 0, 64, 400]


@pytest.fixture
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave every kernel the one of its configurations that the test's ``configuration`` names: nothing is tuned."""
    kernels = pytest.importorskip("moe_scale.moe.kernels.grouped_gemm_triton")
    place = request.node.callspec.params["configuration"]
    for name in ("up_kernel", "rows_kernel", "down_backward_kernel", "weight_grad_kernel"):
        kernel = getattr(kernels, name)
        *usual, for_fp32 = kernel.configs
        monkeypatch.setattr(kernel, "configs", [usual[min(place, len(usual) - 1)], for_fp32])
        monkeypatch.setattr(kernel, "cache", {})


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("configuration", "dtype", "counts", "d_model", "hidden", "activation"),
    [
        *((n, torch.bfloat16, [1200] * 16, 1024, 512, "swiglu") for n in range(4)),
        (0, torch.bfloat16, [1, 1], 16, 8, "swiglu"),
        (0, torch.bfloat16, [0, 2048, 0], 512, 320, "swiglu"),  # widths that are no multiples of the blocks
        (2, torch.bfloat16, MANY, 136, 72, "swiglu"),
        (0, torch.bfloat16, MANY, 256, 128, "gelu"),
        (1, torch.bfloat16, MANY, 256, 128, "relu"),
        (0, torch.float16, MANY, 256, 128, "swiglu"),
        (0, torch.float32, MANY, 256, 128, "swiglu"),
        (0, torch.float32, MANY, 136, 72, "gelu"),
    ],
)
def test_triton_kernels_agree_with_fp64(
    configuration: int, dtype: torch.dtype, counts: list[int], d_model: int, hidden: int, activation: str
) -> None:
    expected = run_experts("torch", dtype, counts, d_model, hidden, activation, exact=True)
    # Memory that holds NaN tells what a kernel leaves out.
    spoiled = torch.full((1 << 26,), float("nan"), device="cuda")
    del spoiled
    found = run_experts("triton", dtype, counts, d_model, hidden, activation)
    again = run_experts("triton", dtype, counts, d_model, hidden, activation)
    for name, ours, same, theirs in zip(("y", "x", "weight", "gate_up", "down"), found, again, expected, strict=True):
        error = (ours.double().cpu() - theirs).norm() / theirs.norm()
        assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"
        assert torch.equal(ours, same), f"{name}: two runs differ"


def test_the_kernels_keep_less_than_torch_does() -> None:
    """Neither gathered rows nor outputs of the experts: at 4 experts a token that is most of what a layer keeps."""
    held = {}
    for kernels in KERNELS:
        config = MoEConfig(num_experts=16, top_k=4, intermediate_size=128, kernels=kernels)  # type: ignore[arg-type]
        layer = MoELayer(config, 512, ParallelGroups(), Init(0)).to("cuda", torch.bfloat16)
        x_BSD = torch.randn(1, 8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        layer(x_BSD)[0].sum().backward()
        before = torch.cuda.memory_allocated()
        y_BSD, _ = layer(x_BSD)
        held[kernels] = torch.cuda.memory_allocated() - before
        del y_BSD
    rows = 8192 * 4 * 512 * 2
    assert held["torch"] - held["triton"] > 1.8 * rows


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
