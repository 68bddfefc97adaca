"""The classifier: an encoder over tokens or features, a pooled sequence, and a linear map to the classes.

Shapes: B batch, S sequence, I width of what enters, D model width, C classes, E experts, M sparse layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.config import ClassifierModelConfig, MoEConfig
from moe_scale.initialization import Init
from moe_scale.models.encoder import Encoder
from moe_scale.models.layers import Linear, TokenEmbedding
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.groups import ParallelGroups


class ClassifierOutput(NamedTuple):
    """What a forward pass returns. Losses are in nats an example."""

    loss: Tensor
    """The cross entropy (smoothed in training) plus the weighted router losses: what is trained."""
    lm_loss: Tensor
    """Mean -log p(label) over the examples that have one, without smoothing."""
    num_targets: Tensor
    """fp32 number of examples that have a label."""
    moe: MoEStats | None
    """The layers' statistics stacked: scalars as [M], counts as [M, E]; None without sparse layers."""
    logits_BC: Tensor
    """fp32, before the softmax."""


class PretrainedEmbedding(TokenEmbedding):
    """A token embedding that begins with given vectors, scaled as a whole to the variance of random ones."""

    def __init__(self, vectors_VI: Tensor, init: Init):
        super().__init__(vectors_VI.shape[0], vectors_VI.shape[1], init)
        if not self.weight.is_meta:
            scale = vectors_VI.shape[1] ** -0.5 / vectors_VI.float().std()
            with torch.no_grad():
                self.weight.copy_(vectors_VI.float() * scale)


class Pooling(nn.Module):
    """One vector a sequence: the mean of its positions, evenly or weighted by how they fit a learned query."""

    def __init__(self, kind: str, d_model: int, init: Init):
        super().__init__()
        self.query = Linear(d_model, 1, init / "query") if kind == "attention" else None

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> Tensor:
        if self.query is None:
            weights_BS = valid_BS.float()
        else:
            scores_BS = self.query(x_BSD).squeeze(-1).float()
            weights_BS = scores_BS.masked_fill(~valid_BS, -1e9).softmax(dim=-1) * valid_BS
        weights_BS = weights_BS / weights_BS.sum(dim=-1, keepdim=True).clamp(min=1e-9)  # a row may be padding alone
        return torch.einsum("bs,bsd->bd", weights_BS.to(x_BSD.dtype), x_BSD)


class ClassHead(Linear):
    """Linear map to the classes, with a bias, which learns how frequent they are."""

    def __init__(self, d_model: int, num_classes: int, init: Init):
        super().__init__(d_model, num_classes, init, bias=True)


class Classifier(nn.Module):
    """An encoder with experts that gives a sequence one of ``output_size`` classes.

    Text enters as token ids through an embedding of width ``input_size``, features as they are; a linear map takes
    either to the stream.

    Args:
        config: the model's settings.
        moe: the sparse layers' settings.
        groups: process groups.
        seed: of the initial weights.
        of_features: build it without an embedding.
        vectors_VI: what the token embedding begins with; None draws it.
    """

    def __init__(
        self,
        config: ClassifierModelConfig,
        moe: MoEConfig,
        groups: ParallelGroups | None = None,
        seed: int = 0,
        *,
        of_features: bool = False,
        vectors_VI: Tensor | None = None,
    ):
        super().__init__()
        groups, init = groups or ParallelGroups(), Init(seed)
        self.config, self.moe_config = config, moe
        self.embedding: TokenEmbedding | None = None
        if vectors_VI is not None:
            self.embedding = PretrainedEmbedding(vectors_VI, init / "embedding")
        elif not of_features:
            self.embedding = TokenEmbedding(config.vocab_size, config.input_size, init / "embedding")
        self.project = Linear(config.input_size, config.hidden_size, init / "project")
        self.encoder = Encoder(config, moe, groups, init / "encoder")
        self.pooling = Pooling(config.pooling, config.hidden_size, init / "pooling")
        self.dropout = nn.Dropout(config.dropout)
        self.head = ClassHead(config.hidden_size, config.output_size, init / "head")

    def forward(self, inputs: Tensor, valid_BS: Tensor, labels_B: Tensor) -> ClassifierOutput:
        """Classify.

        Args:
            inputs: int64 token ids [B, S], or features [B, S, I].
            valid_BS: bool, False for padding.
            labels_B: int64; -100 for an example that does not count.
        """
        if self.embedding is not None:
            ids_BS, x_BSI = inputs, self.embedding(inputs) * self.config.input_size**0.5
        else:
            ids_BS, x_BSI = torch.zeros_like(valid_BS, dtype=torch.int64), inputs.to(self.project.weight.dtype)
        if self.training and self.config.position_dropout:
            shape = (*valid_BS.shape, 1)
            x_BSI = x_BSI * (torch.rand(shape, device=x_BSI.device) >= self.config.position_dropout)
        x_BSD, moe = self.encoder(self.project(x_BSI), valid_BS, ids_BS)
        logits_BC = self.head(self.dropout(self.pooling(x_BSD, valid_BS))).float()
        return self._score(logits_BC, labels_B, moe)

    def _score(self, logits_BC: Tensor, labels_B: Tensor, moe: MoEStats | None) -> ClassifierOutput:
        num_targets = (labels_B >= 0).sum().float()
        smoothing = self.config.label_smoothing if self.training else 0.0
        losses = [F.cross_entropy(logits_BC, labels_B, reduction="sum", label_smoothing=s) for s in (smoothing, 0.0)]
        loss, nll = (value / num_targets.clamp(min=1) for value in losses)
        if moe is not None:
            weights = self.moe_config
            loss = loss + weights.aux_loss_weight * moe.aux_loss.sum() + weights.z_loss_weight * moe.z_loss.sum()
        return ClassifierOutput(loss, nll.detach(), num_targets, moe, logits_BC)
