"""How well a language model predicts held-out text. B batch, S sequence, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from moe_scale.parallel.collectives import sum_over_ranks


class LMScores(NamedTuple):
    """Scores of held-out text, over all ranks."""

    loss: float
    """Mean -log p(token), nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """The summed loss in bits over the UTF-8 bytes that the scored tokens stand for."""
    unigram_entropy: float
    """Entropy of the scored tokens' own frequencies, nats: what a model reaches that ignores context."""
    tokens: int
    """Tokens scored."""
    sink_share: list[float]
    """Per layer, the share of attention given to the first token (arXiv 2505.06708); empty when not measured."""

    def record(self) -> dict[str, Any]:
        """The scores under the names that the metrics file uses."""
        mean_sink = sum(self.sink_share) / len(self.sink_share) if self.sink_share else None
        return {
            "eval/loss": self.loss,
            "eval/perplexity": self.perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/unigram_entropy": self.unigram_entropy,
            "eval/tokens": self.tokens,
            **(
                {}
                if mean_sink is None
                else {"eval/sink_share": mean_sink, "eval/sink_share_per_layer": self.sink_share}
            ),
        }


@torch.no_grad()
def score(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    token_bytes_V: np.ndarray,
    vocab_size: int,
    sink_sequences: int,
    device: torch.device,
) -> LMScores:
    """Score held-out batches. All ranks must call it together with the same number of batches.

    Args:
        model: the engine (or a bare model) in evaluation mode.
        batches: of ids_BS, targets_BS (-100 does not count) and document_ids_BS.
        token_bytes_V: UTF-8 bytes that each token of the tokenizer stands for.
        vocab_size: rows of the model's embedding, at least as many as the tokenizer has tokens.
        sink_sequences: sequences a rank whose attention sink is measured too; at least one batch where not 0.
    """
    frequency_V = torch.zeros(vocab_size, dtype=torch.float64)
    nats = 0.0
    sinks: list[torch.Tensor] = []
    measured = 0
    for batch in batches:
        want_sink = measured < sink_sequences
        output = model(
            batch.ids_BS.to(device), batch.targets_BS.to(device), batch.document_ids_BS.to(device), want_sink=want_sink
        )
        nats += float(output.lm_loss) * float(output.num_targets)
        targets = batch.targets_BS[batch.targets_BS >= 0].cpu()
        frequency_V += torch.bincount(targets, minlength=vocab_size)
        if want_sink:
            measured += batch.ids_BS.shape[0]
            if len(targets):  # a batch of padding alone has no attention to speak of
                sinks.append(output.sink_share.double().cpu())

    num_layers = len(sinks[0]) if sinks else 0
    counted = _summed(torch.tensor([nats, float(len(sinks))], dtype=torch.float64), device)
    frequency_V = _summed(frequency_V, device)
    total_nats, sink_batches = counted[0].item(), counted[1].item()
    sink_share = []
    if sink_batches:
        layers = int(_max_over_ranks(num_layers, device))
        mine = torch.stack(sinks).sum(dim=0) if sinks else torch.zeros(layers, dtype=torch.float64)
        sink_share = (_summed(mine, device) / sink_batches).tolist()

    tokens = frequency_V.sum().item()
    shares = frequency_V / max(tokens, 1.0)
    num_bytes = float(frequency_V[: len(token_bytes_V)].numpy() @ token_bytes_V)
    loss = total_nats / max(tokens, 1.0)
    return LMScores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=total_nats / math.log(2) / max(num_bytes, 1.0),
        unigram_entropy=torch.special.entr(shares).sum().item(),
        tokens=int(tokens),
        sink_share=sink_share,
    )


def _summed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The float64 sum over ranks, on the host."""
    return sum_over_ranks(values.double().to(device)).cpu()


def _max_over_ranks(value: float, device: torch.device) -> float:
    tensor = torch.tensor(float(value), device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()
