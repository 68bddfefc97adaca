"""Which of our tensors are which of theirs, as rules that work both ways.

Shapes: D model width, H query heads, G key/value heads, A head width, E experts, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_scale.config import DecoderConfig, MoEConfig
from moe_scale.models.hf.families import (
    GLOBAL_NAMES,
    LAYER_NAMES,
    SELECTION_BIAS,
    SHARED_NAMES,
    SILENT_SHARED_WIDTH,
    Family,
)
from moe_scale.models.layers import is_sparse

Change = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """Some of our tensors and the same numbers as theirs.

    Attributes:
        ours, theirs: names. Without any of ours, theirs are zero.
        to_theirs, to_ours: what makes the tensors of one side of those of the other.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Change
    to_ours: Change


def rules(family: Family, model: DecoderConfig, moe: MoEConfig) -> Iterator[Rule]:
    """The rules of a whole model, in the order of our parameters.

    ``moe.noise``, which a noisy router uses in training alone, has no counterpart and is in no rule.
    """
    yield same("embedding.weight", GLOBAL_NAMES["embedding.weight"])
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        yield from _attention(family, model, moe, ours, theirs)
        yield from _sparse(family, model, moe, ours, theirs) if is_sparse(moe, layer) else _dense(ours, theirs)
    yield shifted("final_norm.weight", GLOBAL_NAMES["final_norm.weight"], family.norm_shift)
    if not model.tie_embeddings:
        yield same("head.weight", GLOBAL_NAMES["head.weight"])


def _attention(family: Family, model: DecoderConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Rule]:
    norms = ["attention_norm.weight", "ffn_norm.weight"]
    norms += [] if family.qk_norm == "none" else ["attention.q_norm.weight", "attention.k_norm.weight"]
    for name in norms:
        yield shifted(ours + name, theirs + LAYER_NAMES[name], family.norm_shift)
    projections = tuple(f"{theirs}self_attn.{name}_proj.weight" for name in "qkv")
    out = ours + "attention.out.weight", theirs + LAYER_NAMES["attention.out.weight"]
    if not family.gated:
        inner, kv_inner = (heads * model.head_width for heads in (model.num_heads, model.num_kv_heads))
        yield stacked(ours + "attention.qkv.weight", projections, (inner, kv_inner, kv_inner))
        yield same(*out)
        return
    yield gated_qkv(model, ours, projections)
    # A gate whose scores are zero halves what passes.
    yield scaled(*out, 2.0 if model.attention_gate == "none" else 1.0)


def _dense(ours: str, theirs: str) -> Iterator[Rule]:
    both = tuple(f"{theirs}mlp.{name}.weight" for name in ("gate_proj", "up_proj"))
    yield stacked(ours + "ffn.gate_up.weight", both)
    yield same(ours + "ffn.down.weight", f"{theirs}mlp.down_proj.weight")


def _sparse(family: Family, model: DecoderConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Rule]:
    block, (gate, up, down) = f"{theirs}{family.block}.", family.expert
    yield scaled(ours + "moe.router.weight", f"{block}gate.weight", 1 / moe.router_temperature)
    yield experts(ours + "moe.experts.gate_up", f"{block}experts.{{}}.{{}}.weight", (gate, up), moe.num_experts)
    yield experts(ours + "moe.experts.down", f"{block}experts.{{}}.{{}}.weight", (down,), moe.num_experts)
    if family.router == "sigmoid":
        yield same(ours + "moe.selection_bias_E", block + SELECTION_BIAS)
    if family.shared != "none":
        yield from _shared(family, model, moe, ours, block)


def _shared(family: Family, model: DecoderConfig, moe: MoEConfig, ours: str, block: str) -> Iterator[Rule]:
    gate, up, down = (f"{block}{SHARED_NAMES[family.shared]}.{name}.weight" for name in family.expert)
    scored = family.shared == "scored"
    if scored:
        yield zero(f"{block}shared_expert_gate.weight", (1, model.d_model))
    if moe.shared_intermediate_size:
        yield stacked(ours + "moe.dense.gate_up", (gate, up))
        yield scaled(ours + "moe.dense.down", down, 2.0 if scored else 1.0)  # the sigmoid of a score of zero is 1/2
        return
    width = SILENT_SHARED_WIDTH if scored else moe.intermediate_size
    for name in (gate, up):
        yield zero(name, (width, model.d_model))
    yield zero(down, (model.d_model, width))


def same(ours: str, theirs: str) -> Rule:
    """The same tensor."""
    return Rule((ours,), (theirs,), list, list)


def shifted(ours: str, theirs: str, shift: float) -> Rule:
    """Ours is theirs plus ``shift``."""
    if not shift:
        return same(ours, theirs)
    return Rule((ours,), (theirs,), lambda x: [x[0] - shift], lambda x: [x[0] + shift])


def scaled(ours: str, theirs: str, factor: float) -> Rule:
    """Theirs is ours times ``factor``."""
    if factor == 1:
        return same(ours, theirs)
    return Rule((ours,), (theirs,), lambda x: [x[0] * factor], lambda x: [x[0] / factor])


def zero(theirs: str, shape: tuple[int, ...]) -> Rule:
    """A tensor of theirs that ours have no need of."""
    return Rule((), (theirs,), lambda _: [torch.zeros(shape)], lambda _: [])


def stacked(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...] | None = None) -> Rule:
    """Ours has theirs one below the other, of equally many rows where no ``sizes`` are given."""

    def apart(x: Sequence[Tensor]) -> list[Tensor]:
        return list(x[0].split(list(sizes)) if sizes else x[0].chunk(len(theirs)))

    return Rule((ours,), theirs, apart, lambda x: [torch.cat(list(x))])


def experts(ours: str, pattern: str, names: tuple[str, ...], number: int) -> Rule:
    """Ours has all experts in one tensor, each with its ``names`` one below the other."""
    theirs = tuple(pattern.format(expert, name) for expert in range(number) for name in names)

    def apart(x: Sequence[Tensor]) -> list[Tensor]:
        return [part for expert in x[0] for part in expert.chunk(len(names))]

    def together(x: Sequence[Tensor]) -> list[Tensor]:
        stack = torch.stack(list(x))  # [E * names, ...]
        return [stack.view(number, -1, stack.shape[-1])]

    return Rule((ours,), theirs, apart, together)


def gated_qkv(model: DecoderConfig, ours: str, theirs: tuple[str, ...]) -> Rule:
    """``q_proj`` has the rows of each head's query, and after them those of its gate.

    A gate of ours with one value a head becomes one whose values are the same; no gate becomes one of zeros.
    """
    heads, width, kv_inner = model.num_heads, model.head_width, model.num_kv_heads * model.head_width
    gate_name = () if model.attention_gate == "none" else (ours + "attention.gate.weight",)

    def apart(x: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = x[0].split([heads * width, kv_inner, kv_inner])
        gate = x[1] if gate_name else torch.zeros_like(q)
        if len(gate) == heads:
            gate = gate.repeat_interleave(width, dim=0)
        per_head = heads, width, model.d_model
        return [torch.cat([q.view(per_head), gate.view(per_head)], dim=1).flatten(0, 1), k, v]

    def together(x: Sequence[Tensor]) -> list[Tensor]:
        q, gate = x[0].view(heads, 2, width, model.d_model).unbind(1)
        return [torch.cat([q.flatten(0, 1), x[1], x[2]]), gate.flatten(0, 1)]

    return Rule((ours + "attention.qkv.weight", *gate_name), theirs, apart, together)
