"""Encoders of texts and images, what they are compared by, and what is told from both.

Shapes: B batch, S tokens, P positions of the image, D model width, E width of the shared space, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_scale.config import MoEConfig, MultimodalModelConfig
from moe_scale.initialization import Init
from moe_scale.models.classifier import ClassHead
from moe_scale.models.contrastive import Temperature, contrastive_loss, hard_negatives
from moe_scale.models.encoder import Encoder
from moe_scale.models.fusion import Fusion
from moe_scale.models.layers import Linear, TokenEmbedding
from moe_scale.models.vit import VisionTransformer
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.collectives import mean_of_all
from moe_scale.parallel.groups import ParallelGroups

NO_CLASS = -100
"""Label of a row that has none."""


class MultimodalOutput(NamedTuple):
    """What a forward pass returns. Each loss's mean over ranks is that of the rows of all ranks."""

    loss: Tensor
    """What is trained: the goal's loss plus the weighted router losses."""
    lm_loss: Tensor
    """The goal's loss alone: contrastive plus matching, cross entropy (nats a row), or squared error; no gradient."""
    parts: dict[str, Tensor]
    """Of retrieval: ``contrastive`` and with fusion ``matching``, unweighted and without a gradient."""
    moe: MoEStats | None
    """The layers' statistics stacked: scalars as [M], counts as [M, E]; None without sparse layers."""
    outputs_BO: Tensor | None
    """fp32 logits of the classes, or the predicted score [B, 1]; None for retrieval."""
    image_BE: Tensor | None
    """fp32 features of unit length of retrieval; the similarity of two is their product."""
    text_BE: Tensor | None
    """The same of the texts."""
    scale: Tensor | None
    """fp32 scalar: what retrieval multiplies similarities with to compare them."""


class TextEncoder(nn.Module):
    """Tokens as vectors: embedding, which of two texts a token is in, and an encoder whose layers may be sparse."""

    def __init__(self, config: MultimodalModelConfig, moe: MoEConfig, groups: ParallelGroups, init: Init):
        super().__init__()
        self.scale = config.text_width**0.5  # embeddings are drawn small
        self.embedding = TokenEmbedding(config.vocab_size, config.text_width, init / "embedding")
        self.segments = TokenEmbedding(2, config.text_width, init / "segments")
        self.encoder = Encoder(config.text, moe, groups, init / "encoder")

    def forward(self, ids_BS: Tensor, valid_BS: Tensor, segments_BS: Tensor | None) -> tuple[Tensor, MoEStats | None]:
        """Encode. Without ``segments_BS`` all tokens are of the first text. Returns x_BSD and what layers report."""
        segments_BS = torch.zeros_like(ids_BS) if segments_BS is None else segments_BS
        x_BSD = (self.embedding(ids_BS) + self.segments(segments_BS)) * self.scale
        encoded = self.encoder(x_BSD, valid_BS, ids_BS)
        return encoded.x_BSD, encoded.moe


class TextImageModel(nn.Module):
    """A text encoder and, by what enters and what is learned, a Vision Transformer, a fusion and a head.

    ==============================  ================================================================
    retrieval                       features of text and image, compared; with fusion, pairs matched
    classification, regression      of text: from the encoder; of text and image: from the fusion
    ==============================  ================================================================

    Args:
        config: the model's settings, with nothing left to the data.
        moe: the sparse layers' settings.
        groups: process groups.
        seed: of the initial weights.
    """

    def __init__(
        self, config: MultimodalModelConfig, moe: MoEConfig, groups: ParallelGroups | None = None, seed: int = 0
    ):
        super().__init__()
        groups, init = groups or ParallelGroups(), Init(seed)
        self.config, self.moe_config = config, moe
        self.text = TextEncoder(config, config.experts_of("text", moe), groups, init / "text")
        self.image = VisionTransformer(config.image, init / "image") if config.has_images else None
        self.fusion: Fusion | None = None
        if config.has_fusion:
            widths, fusion_moe = (config.text_width, config.image_width), config.experts_of("fusion", moe)
            self.fusion = Fusion(config.fusion, *widths, fusion_moe, groups, init / "fusion")
        self.dropout = nn.Dropout(config.dropout)
        self.retrieves = config.goal == "retrieval"
        if self.retrieves:
            self.project_text = Linear(config.text_width, config.embed_size, init / "project_text")
            self.project_image = Linear(config.image_width, config.embed_size, init / "project_image")
            self.temperature = Temperature()
            self.match = ClassHead(2 * config.fusion_width, 2, init / "match") if self.fusion is not None else None
        else:
            width = 2 * config.fusion_width if self.fusion is not None else config.text_width
            self.head = ClassHead(width, config.num_outputs, init / "head")

    def forward(
        self,
        images_BCHW: Tensor | None,
        ids_BS: Tensor,
        valid_BS: Tensor,
        segments_BS: Tensor | None,
        labels_B: Tensor | None,
        items_B: Tensor,
        present_B: Tensor,
    ) -> MultimodalOutput:
        """Run on a batch, whose fields the arguments are. Of retrieval all ranks call it together."""
        valid_BS = valid_BS & present_B[:, None]
        text_BSD, stats = self.text(ids_BS, valid_BS, segments_BS)
        image_BPD = None
        if self.image is not None:
            assert images_BCHW is not None, "this model takes images"
            image_BPD = self.image(images_BCHW)
        of_layers = [] if stats is None else [stats]
        if self.retrieves:
            assert image_BPD is not None
            return self._retrieve(text_BSD, valid_BS, image_BPD, items_B, present_B, of_layers)
        if self.fusion is not None:
            assert image_BPD is not None
            fused = self.fusion(text_BSD, valid_BS, image_BPD, present_B)
            pooled, of_layers = fused.x_BD, of_layers + _stacked(fused.moe)
        else:
            pooled = self.pool_text(text_BSD, valid_BS)
        outputs_BO = self.head(self.dropout(pooled)).float()
        assert labels_B is not None, "this model needs labels"
        loss = self._label_loss(outputs_BO, labels_B, present_B)
        return self._output(loss, {}, of_layers, outputs_BO=outputs_BO)

    def pool_text(self, text_BSD: Tensor, valid_BS: Tensor) -> Tensor:
        """A text as one vector [B, D]; that of a text without tokens is zero where the mean is asked for."""
        if self.config.pooling == "first":
            return text_BSD[:, 0]
        count_B1 = valid_BS.sum(dim=1, keepdim=True).clamp(min=1)
        return (text_BSD * valid_BS[..., None]).sum(dim=1) / count_B1.to(text_BSD.dtype)

    def pool_image(self, image_BPD: Tensor) -> Tensor:
        """An image as one vector [B, D]; position 0 is CLS, which stands for no patch."""
        return image_BPD[:, 0] if self.config.pooling == "first" else image_BPD[:, 1:].mean(dim=1)

    def _retrieve(
        self,
        text_BSD: Tensor,
        valid_BS: Tensor,
        image_BPD: Tensor,
        items_B: Tensor,
        present_B: Tensor,
        of_layers: list[MoEStats],
    ) -> MultimodalOutput:
        text_BE = F.normalize(self.project_text(self.pool_text(text_BSD, valid_BS)).float(), dim=-1)
        image_BE = F.normalize(self.project_image(self.pool_image(image_BPD)).float(), dim=-1)
        scale = self.temperature()
        contrastive = contrastive_loss(image_BE, text_BE, items_B, present_B, scale)
        loss = self.config.contrastive_weight * contrastive
        parts = {"contrastive": contrastive.detach()}
        if self.fusion is not None:
            logits_BB = (scale * image_BE @ text_BE.t()).detach()
            matching, matched = self._match(text_BSD, valid_BS, image_BPD, items_B, present_B, logits_BB)
            loss = loss + self.config.matching_weight * matching
            parts["matching"] = matching.detach()
            of_layers = of_layers + matched
        features = {"image_BE": image_BE, "text_BE": text_BE, "scale": scale.detach().squeeze(0)}
        return self._output(loss, parts, of_layers, **features)

    def _match(
        self,
        text_BSD: Tensor,
        valid_BS: Tensor,
        image_BPD: Tensor,
        items_B: Tensor,
        present_B: Tensor,
        logits_BB: Tensor,
    ) -> tuple[Tensor, list[MoEStats]]:
        """Image-text matching (arXiv 2107.07651, section 3.1.2): each pair against its image with a similar text and
        its text with a similar image, of this rank's batch. Returns the loss and the fusion's statistics."""
        assert self.fusion is not None
        assert self.match is not None
        texts = hard_negatives(logits_BB, items_B, present_B, sample=self.training)
        images = hard_negatives(logits_BB.t(), items_B, present_B, sample=self.training)
        own_B = torch.arange(len(items_B), device=items_B.device)
        text_rows = torch.cat([own_B, texts.rows_B, own_B])
        image_rows = torch.cat([own_B, own_B, images.rows_B])
        counts = torch.cat([present_B, texts.found_B, images.found_B])
        fused = self.fusion(text_BSD[text_rows], valid_BS[text_rows], image_BPD[image_rows], counts)
        labels = torch.zeros_like(text_rows)
        labels[: len(own_B)] = 1
        logits = self.match(self.dropout(fused.x_BD)).float()
        each = F.cross_entropy(logits, labels, reduction="none") * counts
        return mean_of_all(each.sum(), counts.sum()), _stacked(fused.moe)

    def _label_loss(self, outputs_BO: Tensor, labels_B: Tensor, present_B: Tensor) -> Tensor:
        if self.config.goal == "regression":
            counts_B = present_B & labels_B.isfinite()
            errors_B = (outputs_BO[:, 0] - labels_B.masked_fill(~counts_B, 0.0)).square()
            return mean_of_all((errors_B * counts_B).sum(), counts_B.sum())
        labels_B = labels_B.masked_fill(~present_B, NO_CLASS)
        total = F.cross_entropy(outputs_BO, labels_B, reduction="sum", ignore_index=NO_CLASS)
        return mean_of_all(total, (labels_B != NO_CLASS).sum())

    def _output(
        self,
        loss: Tensor,
        parts: dict[str, Tensor],
        of_layers: list[MoEStats],
        *,
        outputs_BO: Tensor | None = None,
        image_BE: Tensor | None = None,
        text_BE: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> MultimodalOutput:
        moe, goal_loss = None, loss.detach()
        if of_layers:
            moe = MoEStats(*map(torch.cat, zip(*of_layers, strict=True)))
            weights = self.moe_config
            loss = loss + weights.aux_loss_weight * moe.aux_loss.sum() + weights.z_loss_weight * moe.z_loss.sum()
        return MultimodalOutput(loss, goal_loss, parts, moe, outputs_BO, image_BE, text_BE, scale)


def _stacked(layers: list[MoEStats]) -> list[MoEStats]:
    """The statistics of a stack's layers as one, or as none."""
    return [MoEStats(*map(torch.stack, zip(*layers, strict=True)))] if layers else []
