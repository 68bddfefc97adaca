"""What a forward pass keeps for the backward pass, term by term, and the most that is held on top of it.

One function a part of the model, each term next to the operation that keeps it. Three kinds of kernels keep different
things: ``cpu`` (a CPU's fused experts, RMSNorms without a kernel of their own), ``torch`` (a GPU's grouped products,
fused RMSNorm, attention without its scores) and ``triton``. Those of ``cpu`` are held against the allocations of real
passes by ``tests/unit/planner/test_activations.py``; the other two are read off the code, not measured yet.

Units: bytes. T tokens of a micro-batch, S sequence, D model width, H and G query and key/value heads of width A, V
vocabulary, E experts, K experts a token, N = T*K rows that leave, R rows that arrive, F expert width,
I = 2F with SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_scale.models.layers import dense_hidden, is_sparse
from moe_scale.planner.model import Subject
from moe_scale.planner.traffic import expected_rows

Terms = dict[str, float]
INT64 = 8


@dataclass(frozen=True)
class Shapes:
    """Sizes of one micro-batch, and what is kept in which type.

    Attributes:
        kernels: cpu, torch or triton.
        size: bytes of an activation.
        rows: N, rows of this rank's tokens.
        arrived: R, rows that this rank's experts get; N without expert parallelism.
        masked: whether sequences hold several documents, so that attention needs a mask.
    """

    model: Any
    moe: Any
    kernels: str
    size: int
    batch: int
    seq_len: int
    ep_size: int
    rows: float
    arrived: float
    masked: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


@dataclass(frozen=True)
class Activations:
    """Activation memory of one micro-batch.

    Attributes:
        saved: what is kept when the forward pass is over, by part, over all layers.
        head: the loss: a chunk of logits, and the gradients that its forward pass computes.
        peak: most that is held at once.
        peak_at: when that is.
    """

    saved: Terms
    head: float
    peak: float
    peak_at: str


def shapes_of(subject: Subject, *, masked: bool, arrived: float | None = None) -> Shapes:
    """The shapes of a run's micro-batch; ``arrived`` rows reach the fullest rank, by default an even share."""
    config = subject.config
    kernels = "cpu" if subject.cluster.is_cpu else ("triton" if config.moe.kernels == "triton" else "torch")
    rows = expected_rows(subject) if config.moe.enabled else 0.0
    return Shapes(
        config.model, config.moe, kernels, subject.bytes_per_value, subject.plan.micro_batch, config.data.seq_len,
        subject.ep_size, rows, rows if arrived is None else arrived, masked,
    )  # fmt: skip


def _norm(s: Shapes, width: int, output: bool = True) -> float:
    """An RMSNorm of T rows of ``width``: what it keeps, and its output, which what follows keeps."""
    stats = s.tokens * 4.0
    out = s.tokens * width * s.size if output else 0
    if s.kernels == "cpu":  # the input and the normed values, both in fp32
        return s.tokens * width * 8 + stats + out
    return s.tokens * width * s.size + stats + out  # a kernel of its own: the input as it came


def attention(s: Shapes) -> Terms:
    """Terms of an attention block with the norm before it."""
    m, tokens, size = s.model, s.tokens, s.size
    heads, kv_heads, width = m.num_heads, m.num_kv_heads, m.head_width
    q, k = tokens * heads * width, tokens * kv_heads * width
    gates = {"none": 0, "headwise": heads, "elementwise": heads * width}[m.attention_gate]
    qk_stats = {"none": 0, "whole": 2, "head": heads + kv_heads}[m.qk_norm] * tokens * 4
    if s.kernels == "cpu":
        # fp32 needs no wider copy of q and k: the projection's output is what the norm keeps.
        qk_norm = qk_stats and (q + k) * (4 if size == 4 else 8) + qk_stats
        rope = 0 if size == 4 else 2 * 2 * s.seq_len * width * size
    else:
        qk_norm, rope = qk_stats, 2 * 2 * s.seq_len * width * size
    terms = {
        "attention norm": _norm(s, m.d_model),
        "qkv": (q + 2 * k) * size,
        "q and k norm": qk_norm,
        "rope": rope,
        "rotated q and k": (q + k) * size,
        "attention output": q * size + tokens * heads * 4,
        "attention gate": (tokens * gates + (q if gates else 0)) * size,
    }
    if s.masked:
        terms["attention mask"] = s.batch * s.seq_len**2 * size
    return terms


def dense(s: Shapes, hidden: int, activation: str = "swiglu") -> float:
    """A dense feed-forward: what stood before the activation, the activation, and the product that is projected."""
    if activation == "swiglu":
        return s.tokens * hidden * 4 * s.size
    return s.tokens * hidden * 2 * s.size


def dense_block(s: Shapes) -> Terms:
    """Terms of a dense layer's feed-forward with the norm before it."""
    return {"ffn norm": _norm(s, s.model.d_model), "dense ffn": dense(s, dense_hidden(s.moe))}


def router(s: Shapes) -> Terms:
    """Terms of the router and its losses, all in fp32."""
    moe, tokens = s.moe, s.tokens
    scores = tokens * moe.num_experts * 4
    logits = scores + tokens * 4  # of the z-loss
    ids = tokens * moe.top_k * INT64
    chosen = tokens * (moe.top_k + 1) * 4 if moe.renormalize and moe.top_k > 1 else 0
    kinds = {
        "softmax": scores + logits + ids + chosen,
        "sigmoid": 2 * scores + logits + scores + ids + chosen,
        "noisy": 3 * scores + logits + ids + chosen,
        "expert_choice": scores + logits,
        "hash": 0,
    }
    return {"router": kinds[moe.router]}


def experts(s: Shapes) -> Terms:
    """Terms of dispatch, exchange and experts."""
    moe, width, size = s.moe, s.model.d_model, s.size
    inner = (2 if moe.activation == "swiglu" else 1) * moe.intermediate_size
    plain = not moe.expert_bias and not moe.expert_dropout
    fused = plain and s.kernels in ("cpu", "triton")
    rows, arrived = s.rows, s.arrived
    slots = s.tokens * moe.top_k
    terms: Terms = {"dispatch": slots * INT64 * 2 + rows * (INT64 + 4)}  # order, places, tokens, weights
    hidden = arrived * inner * size
    if not fused:  # the activation and what is projected are tensors of their own
        hidden += arrived * moe.intermediate_size * size * (2 if moe.activation == "swiglu" else 1)
        if moe.expert_dropout:
            hidden += arrived * moe.intermediate_size * (size + 1)
    terms["experts"] = hidden
    if s.ep_size > 1:
        terms["rows that arrived"] = arrived * (width * size + 2 * INT64)
        terms["outputs that came back"] = rows * width * size
    elif not fused:
        terms["gathered rows"] = rows * width * size
        terms["experts' outputs"] = rows * width * size
    return terms


def sparse_block(s: Shapes) -> Terms:
    """Terms of a sparse layer's feed-forward with the norm before it."""
    moe = s.moe
    terms = {"ffn norm": _norm(s, s.model.d_model), **router(s), **experts(s)}
    hidden = moe.intermediate_size if moe.residual else moe.shared_intermediate_size
    if hidden:
        terms["dense half"] = dense(s, hidden, moe.activation)
    if moe.residual:
        terms["dense half"] += s.tokens * (2 * s.model.d_model * s.size + 2 * (4 + 2 * s.size))
    return terms


def layer_terms(s: Shapes, layer: int) -> Terms:
    """All that one layer keeps."""
    return attention(s) | (sparse_block(s) if is_sparse(s.moe, layer) else dense_block(s))


def activations(s: Shapes) -> Activations:
    """The activation memory of one micro-batch: the largest of the moments that can be the peak.

    Those are the loss, forward and backward; and the backward pass of a layer, which begins with everything saved.
    """
    model, width, size, tokens = s.model, s.model.d_model, s.size, s.tokens
    by_layer = [layer_terms(s, layer) for layer in range(model.num_layers)]
    largest = max(range(model.num_layers), key=lambda layer: sum(by_layer[layer].values()))
    stream = float(tokens * width * size)
    shared: Terms = {"token ids, targets": tokens * 2.0 * INT64, "rope": 2 * s.seq_len * model.head_width * 4.0}
    if model.activation_checkpointing:
        saved: Terms = {"residual stream at each layer": model.num_layers * stream} | shared
        recomputed = sum(by_layer[largest].values())
        if s.kernels != "cpu" or size == 4:
            recomputed -= stream  # the first norm keeps its input as it came: the one that is kept already
    else:
        saved = dict(shared)
        for terms in by_layer:
            for name, count in terms.items():
                saved[name] = saved.get(name, 0.0) + count
        recomputed = 0.0
    layers = sum(saved.values())
    final = _norm(s, width)
    embedding = model.vocab_size * width
    chunk = min(model.loss_chunk_tokens, tokens) * model.vocab_size
    rows_at_once = min(32, tokens) * model.vocab_size if s.kernels == "cpu" else chunk
    # The loss's own forward pass: gradients of the hidden states and of the weight in fp32, the chunk's logits, and the
    # larger of a softmax in fp32 and the product that is added to the weight's gradient.
    loss_forward = final + stream + 4 * embedding + chunk * size + max(rows_at_once * 12, embedding * size)
    rounded = 0 if size == 4 else embedding * size
    loss_backward = final + stream + (4 + 4) * embedding + rounded + tokens * width * 4
    # The gradient of a weight that both ends of the model share waits for that of the other end.
    waiting = float(embedding * size) if model.tie_embeddings else 0.0
    working = layer_working(s, largest)
    saved["final norm"] = _norm(s, width, output=False)
    saved["the loss's gradients"] = stream + 4 * embedding
    # A norm without a kernel of its own: gradients of the normed values, of the input by two ways, and of the weight.
    of_norm = 4 * tokens * width * 4 if s.kernels == "cpu" else 2 * stream
    moments = {
        "the loss, forward": layers + loss_forward,
        "the loss, backward": layers + loss_backward,
        "the backward pass of the last norm": layers + waiting + saved["final norm"] + of_norm,
        "the backward pass of a layer": layers + waiting + recomputed + 2 * stream + working,
    }
    at = max(moments, key=lambda name: moments[name])
    return Activations(saved, max(loss_forward, loss_backward), moments[at], at)


def layer_working(s: Shapes, layer: int) -> float:
    """What the backward pass of a layer holds for a moment: gradients of its largest step, of the weights too."""
    moe, size, width = s.moe, s.size, s.model.d_model
    if is_sparse(moe, layer):
        matrices = 3 if moe.activation == "swiglu" else 2
        weights = moe.num_experts // s.ep_size * matrices * width * moe.intermediate_size * size
        rows = s.arrived * width * size * (1 if s.kernels == "cpu" and s.ep_size == 1 else 2)
        if s.ep_size > 1:
            rows += s.rows * width * (size + 4)
        return weights + rows
    # The last map's gradients; or those of both factors of the product, when what that map kept is gone.
    hidden = dense_hidden(moe)
    return max((width + s.tokens) * hidden, 2 * s.tokens * hidden) * size
