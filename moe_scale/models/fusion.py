"""Blocks that fuse a text and an image: cross-attention both ways, and one feed-forward for both.

Shapes: B batch, T text tokens, P positions of the image, D width of the fusion.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_scale.config import MoEConfig, StackConfig
from moe_scale.initialization import Init
from moe_scale.models.encoder import key_mask
from moe_scale.models.layers import Linear
from moe_scale.models.transformer import FeedForward, MultiHeadAttention, Sublayer, build_norm
from moe_scale.moe.layer import MoEStats
from moe_scale.parallel.groups import ParallelGroups


class FusionBlock(nn.Module):
    """The text looks at the image and the image at the text, both as they came in (arXiv 1908.07490, section 2.3); then
    a feed-forward whose weights, experts where it is sparse, serve both (arXiv 2206.02770)."""

    def __init__(self, config: StackConfig, feed_forward: FeedForward, init: Init, depth_scale: float):
        super().__init__()
        self.text_attention = MultiHeadAttention(config, init / "text_attention", depth_scale)
        self.text_residual = Sublayer(config)
        self.image_attention = MultiHeadAttention(config, init / "image_attention", depth_scale)
        self.image_residual = Sublayer(config)
        self.feed_forward = feed_forward

    def forward(
        self, text_BTD: Tensor, image_BPD: Tensor, valid_BT: Tensor, present_B: Tensor
    ) -> tuple[Tensor, Tensor, MoEStats | None]:
        text_in, image_in = self.text_residual.before(text_BTD), self.image_residual.before(image_BPD)
        to_image = self.text_attention.keys_values(image_in)
        to_text = self.image_attention.keys_values(text_in)
        text_BTD = self.text_residual.after(text_BTD, self.text_attention(text_in, to_image))
        image_BPD = self.image_residual.after(image_BPD, self.image_attention(image_in, to_text, key_mask(valid_BT)))
        both_BSD = torch.cat([text_BTD, image_BPD], dim=1)
        of_image_BP = present_B[:, None].expand(image_BPD.shape[:2])
        valid_BS = torch.cat([valid_BT & present_B[:, None], of_image_BP], dim=1)
        no_ids_BS = torch.zeros_like(valid_BS, dtype=torch.int64)
        both_BSD, stats = self.feed_forward(both_BSD, valid_BS, no_ids_BS)
        text_BTD, image_BPD = both_BSD.split([text_BTD.shape[1], image_BPD.shape[1]], dim=1)
        return text_BTD, image_BPD, stats


class Fused(NamedTuple):
    """What the fusion makes of pairs."""

    x_BD: Tensor
    """[B, 2D]: the first position of the text and that of the image, normed."""
    moe: list[MoEStats]
    """Of each sparse layer."""


class Fusion(nn.Module):
    """A stack of :class:`FusionBlock` over encoded texts and images, which come by a linear map each.

    Args:
        config: its settings.
        text_width, image_width: of what enters.
        moe: the sparse layers' settings.
        groups: process groups.
        init: of the weights.
    """

    def __init__(
        self,
        config: StackConfig,
        text_width: int,
        image_width: int,
        moe: MoEConfig,
        groups: ParallelGroups,
        init: Init,
    ):
        super().__init__()
        self.config = config
        self.project_text = Linear(text_width, config.d_model, init / "project_text")
        self.project_image = Linear(image_width, config.d_model, init / "project_image")
        scale = (2 * config.num_layers) ** -0.5  # two sublayers a block add to each stream
        self.blocks = nn.ModuleList()
        for number in range(config.num_layers):
            path = init / "blocks" / number
            feed_forward = FeedForward(config, moe, number, groups, path / "feed_forward", scale)
            self.blocks.append(FusionBlock(config, feed_forward, path, scale))
        self.norm = build_norm(config) if config.norm_order == "pre" else nn.Identity()

    def forward(self, text_BTD: Tensor, valid_BT: Tensor, image_BPD: Tensor, present_B: Tensor) -> Fused:
        """Fuse pairs.

        Args:
            text_BTD, image_BPD: encoded texts and images, of their encoders' widths.
            valid_BT: bool, False for padding.
            present_B: bool, False for rows that no expert takes.
        """
        text_BTD, image_BPD = self.project_text(text_BTD), self.project_image(image_BPD)
        stats = []
        for block in self.blocks:
            text_BTD, image_BPD, block_stats = self._run(block, text_BTD, image_BPD, valid_BT, present_B)
            stats += [] if block_stats is None else [block_stats]
        first_B2D = torch.stack([text_BTD[:, 0], image_BPD[:, 0]], dim=1)
        return Fused(self.norm(first_B2D).flatten(1), stats)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
