"""Parameters and FLOPs of an encoder-decoder from its settings alone; no module is built."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from moe_scale.config import MoEConfig, Seq2SeqConfig
from moe_scale.models.seq2seq import part_moe
from moe_scale.models.transformer_counts import PartCounts, stack_params

Part = Literal["encoder", "decoder"]


def num_params(model: Seq2SeqConfig, moe: MoEConfig) -> int:
    """Parameters of the whole model; the embedding, which is the head as well, counts once."""
    return _embeddings(model) + sum(part_params(model, moe, part).total for part in _parts())


def num_active_params(model: Seq2SeqConfig, moe: MoEConfig) -> int:
    """Parameters that a sentence pair of one token a side uses: of the experts of a layer only K."""
    return _embeddings(model) + sum(part_params(model, moe, part, active=True).total for part in _parts())


def part_params(model: Seq2SeqConfig, moe: MoEConfig, part: Part, *, active: bool = False) -> PartCounts:
    """Parameters of one half."""
    moe = part_moe(model, moe, part)
    layers = model.num_encoder_layers if part == "encoder" else model.num_decoder_layers
    return stack_params(model, moe, layers=layers, attentions=1 if part == "encoder" else 2, active=active)


Lengths = TypeVar("Lengths", float, Any)
"""A number, or an array of numbers."""


def training_flops(model: Seq2SeqConfig, moe: MoEConfig, source_len: Lengths, target_len: Lengths) -> Lengths:
    """FLOPs of the forward and backward pass of a sentence pair, three times the forward pass; a multiply-add is two.

    Matrix products only: 2 FLOPs a weight and token (the decoder's keys and values of the source are made from source
    tokens), the head's for target tokens, and 4*H*A for each query and key of an attention: S^2 in the encoder, about
    T^2/2 causal and T*S across in the decoder, each a layer.

    Args:
        source_len, target_len: tokens of the pair, or arrays of those of many pairs.
    """
    encoder, decoder = (part_params(model, moe, part, active=True) for part in _parts())
    inner = model.num_heads * model.head_width
    from_source = model.num_decoder_layers * 2 * model.d_model * inner
    by_source = source_len * (encoder.matrices + from_source)
    by_target = target_len * (decoder.matrices - from_source + model.vocab_size * model.d_model)
    scores_within = model.num_encoder_layers * source_len**2
    scores_across = model.num_decoder_layers * (target_len * (target_len + 1) / 2 + target_len * source_len)
    return 3 * (2 * (by_source + by_target) + 4 * inner * (scores_within + scores_across))


def _parts() -> tuple[Part, Part]:
    return "encoder", "decoder"


def _embeddings(model: Seq2SeqConfig) -> int:
    positions = 2 * model.max_positions if model.positions == "learned" else 0
    return (model.vocab_size + positions) * model.d_model
