"""Parameters and FLOPs of a Switch Transformer from its settings alone; no module is built."""

from __future__ import annotations

from moe_scale.config import MoEConfig, SwitchModelConfig
from moe_scale.models.layers import dense_width, is_sparse
from moe_scale.models.transformer_counts import stack_params


def num_params(model: SwitchModelConfig, moe: MoEConfig) -> int:
    """Parameters of the whole model; the embedding, which is the head as well, counts once."""
    return _params(model, moe, active=False)


def num_active_params(model: SwitchModelConfig, moe: MoEConfig) -> int:
    """Parameters that one token uses: of the experts of a layer only K."""
    return _params(model, moe, active=True)


def training_flops_per_token(model: SwitchModelConfig, moe: MoEConfig, length: int, prefix: int = 0) -> float:
    """FLOPs of the forward and backward pass, three times the forward pass, a token; a multiply-add is two.

    Matrix products only: 2 FLOPs a weight (the look-up of an embedding is none; the head works where there are
    targets), and 4*D for each key that a query sees in each layer.

    Args:
        length: tokens of a sequence.
        prefix: so many of the first tokens see each other, and have no targets but the last of them.
    """
    weights = stack_params(model, moe, layers=model.num_layers, attentions=1, active=True).matrices
    seen = (prefix * prefix + sum(range(prefix + 1, length + 1))) / length
    with_target = (length - max(prefix - 1, 0)) / length
    head = with_target * model.vocab_size * model.d_model
    return 3 * (2 * (weights + head) + model.num_layers * 4 * model.d_model * seen)


def _params(model: SwitchModelConfig, moe: MoEConfig, *, active: bool) -> int:
    d_model, layers = model.d_model, model.num_layers
    stack = stack_params(model, moe, layers=layers, attentions=1, active=active)
    positions = model.max_positions * d_model if model.positions == "learned" else 0
    total = model.vocab_size * d_model + positions + stack.total
    if not model.bias:
        return total - stack.norms // 2  # counted with a weight and a bias
    dense = sum(not is_sparse(moe, layer) for layer in range(layers))
    return total + layers * 4 * d_model + dense * (dense_width(moe) + d_model)
