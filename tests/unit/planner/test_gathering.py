"""What ZeRO-3 gathers when; against the bytes of real ranks: ``tests/distributed/test_planner.py``."""

from __future__ import annotations

import pytest
import torch

from moe_scale.planner.gathering import backward_order, follow, forward_order
from moe_scale.planner.model import Subject
from recipes.lm_16l import RECIPE
from tests.unit.planner.subjects import small

SHARDED = "zero_optimization.stage3_param_persistence_threshold=0"
REUSE, PREFETCH = "zero_optimization.stage3_max_reuse_distance", "zero_optimization.stage3_prefetch_bucket_size"


def numel(parameters) -> int:
    return sum(p.numel for p in parameters)


def note_gradient(output: torch.Tensor | tuple, name: str, into: list[str]) -> None:
    if isinstance(output, tuple):  # of the head: the loss, and another that has no gradient
        output = output[0]
    if output.requires_grad:
        output.register_hook(lambda _: into.append(name))


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--moe.enabled", "false"],
        ["--moe.every", "2", "--moe.residual", "true", "--model.attention_gate", "none"],
        ["--moe.router", "noisy", "--moe.shared_intermediate_size", "8"],
        ["--moe.router", "hash"],
        ["--model.qk_norm", "none", "--model.tie_embeddings", "false"],
        ["--model.activation_checkpointing", "true"],
    ],
    ids=" ".join,
)
def test_the_orders_are_those_of_a_real_pass(settings: list[str]) -> None:
    """Forward every module, backward those with parameters, which is when their output's gradient is there."""
    subject = small(*settings)
    model = RECIPE.task(subject.config).build_model(None)
    entered: list[str] = []
    backward: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            continue
        module.register_forward_pre_hook(lambda *_, name=name: entered.append(name))
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda _, inputs, output, name=name: note_gradient(output, name, backward))
    ids_BS = torch.randint(512, (1, 32))
    model.train()
    loss = model(ids_BS, ids_BS).loss
    assert entered == forward_order(subject)
    entered.clear()
    loss.backward()
    planned = backward_order(subject)
    owners = {p.name.rpartition(".")[0] for p in subject.parameters} | {"head"}
    if not subject.config.model.activation_checkpointing:
        assert backward == [name for name in planned if name in owners]
        return
    # The last layer is run again, then backward, then the one before it.
    last = [name for name in forward_order(subject) if name.startswith("layers.1")]
    assert entered[: len(last)] == last
    assert set(entered) <= set(planned)
    assert planned.index("layers.1.attention_norm") < planned.index("layers.0.attention_norm")
    assert all(planned.count(name) == 2 for name in owners if name.startswith("layers."))


def test_nothing_is_gathered_twice_while_it_may_be_kept() -> None:
    subject = small(ds=[SHARDED])
    found = follow(subject)
    assert numel(found.forward) == numel(subject.parameters) == found.peak_numel
    assert not found.backward


def test_without_reuse_and_prefetch_everything_is_gathered_in_both_passes() -> None:
    subject = small(ds=[SHARDED, f"{REUSE}=0", f"{PREFETCH}=0"])
    found = follow(subject)
    embedding = numel(p for p in subject.parameters if p.name == "embedding.weight")
    assert numel(found.forward) == numel(subject.parameters) + embedding  # the head's gather is its own
    assert numel(found.forward) == numel(found.backward)
    assert found.peak_numel == max(
        numel(p for p in subject.parameters if p.name.startswith(m)) for m in _modules(subject)
    )


def _modules(subject: Subject) -> set[str]:
    return {p.name.rpartition(".")[0] + "." for p in subject.parameters}


def test_recomputed_layers_are_gathered_once_more() -> None:
    ds = [SHARDED, f"{REUSE}=0", f"{PREFETCH}=0"]
    once = follow(small(ds=ds))
    again = follow(small("--model.activation_checkpointing", "true", ds=ds))
    layers = numel(p for p in small().parameters if p.name.startswith("layers."))
    assert numel(again.backward) <= numel(once.backward) + layers
    assert numel(again.backward) > numel(once.backward)
    assert again.forward == once.forward


def test_a_prefetch_gathers_ahead_and_less_often() -> None:
    apart, ahead = (follow(small(ds=[SHARDED, f"{REUSE}=0", f"{PREFETCH}={n}"])) for n in (0, 20_000))
    assert ahead.forward_calls < apart.forward_calls
    assert ahead.peak_numel > apart.peak_numel
