"""The Vision Transformer (arXiv 2010.11929), pre-norm and with biases, as Hugging Face's ``ViTModel`` computes it.

Modules have the names that they have there, so that weights and adapters of the one fit the other.

Shapes: B batch, C colours, P patches, S = 1 + P positions, D model width, H heads, A head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_scale.config import ImageEncoderConfig
from moe_scale.initialization import Init
from moe_scale.models.layers import Linear


class PatchEmbedding(nn.Module):
    """A linear map of each patch's pixels; its weight has the shape of the equal convolution, [D, C, size, size]."""

    def __init__(self, config: ImageEncoderConfig, init: Init):
        super().__init__()
        self.size = config.patch_size
        pixels = config.channels * self.size**2
        self.weight = nn.Parameter(torch.empty(config.d_model, config.channels, self.size, self.size))
        self.bias = nn.Parameter(torch.zeros(config.d_model))
        init.normal_(self.weight, pixels**-0.5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Patches from left to right and top to bottom. Returns x_BPD."""
        size = self.size
        rows = images_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, rows, size, columns, size]
        patches_BPK = rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_BPK, self.weight.flatten(1), self.bias)


class PatchEmbeddings(nn.Module):
    """The CLS position and one for each patch, with learned positions."""

    def __init__(self, config: ImageEncoderConfig, init: Init):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.d_model))
        (init / "cls_token").normal_(self.cls_token, 0.02)
        (init / "position_embeddings").normal_(self.position_embeddings, 0.02)
        self.patch_embeddings = nn.ModuleDict({"projection": PatchEmbedding(config, init / "patch_embeddings")})
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        patches_BPD = self.patch_embeddings["projection"](images_BCHW)
        first_B1D = self.cls_token.expand(len(patches_BPD), -1, -1)
        return self.dropout(torch.cat([first_B1D, patches_BPD], dim=1) + self.position_embeddings)


class ViTAttention(nn.Module):
    """Self-attention over all positions, with biases."""

    def __init__(self, config: ImageEncoderConfig, init: Init, depth_scale: float):
        super().__init__()
        self.heads, self.dropout, d_model = config.num_heads, config.dropout, config.d_model
        self.q_proj = Linear(d_model, d_model, init / "q_proj", bias=True)
        self.k_proj = Linear(d_model, d_model, init / "k_proj", bias=True)
        self.v_proj = Linear(d_model, d_model, init / "v_proj", bias=True)
        self.o_proj = Linear(d_model, d_model, init / "o_proj", depth_scale * d_model**-0.5, bias=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BHSA, k_BHSA, v_BHSA = (
            project(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        y_BHSA = F.scaled_dot_product_attention(q_BHSA, k_BHSA, v_BHSA, dropout_p=dropout)
        return self.o_proj(y_BHSA.transpose(1, 2).flatten(2))


class ViTMLP(nn.Module):
    """The position-wise half of a layer: two linear maps with biases and a GELU between them."""

    def __init__(self, config: ImageEncoderConfig, init: Init, depth_scale: float):
        super().__init__()
        d_model, hidden = config.d_model, config.hidden
        self.fc1 = Linear(d_model, hidden, init / "fc1", bias=True)
        self.fc2 = Linear(hidden, d_model, init / "fc2", depth_scale * hidden**-0.5, bias=True)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BSD)))


class ViTLayer(nn.Module):
    """Attention and feed-forward, each with a norm before it."""

    def __init__(self, config: ImageEncoderConfig, init: Init, depth_scale: float):
        super().__init__()
        self.attention = ViTAttention(config, init / "attention", depth_scale)
        self.layernorm_before = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.layernorm_after = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp = ViTMLP(config, init / "mlp", depth_scale)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.layernorm_before(x_BSD)))
        return x_BSD + self.dropout(self.mlp(self.layernorm_after(x_BSD)))


class VisionTransformer(nn.Module):
    """An image as a sequence: CLS, then its patches.

    Args:
        config: its settings.
        init: of the weights.
    """

    def __init__(self, config: ImageEncoderConfig, init: Init):
        super().__init__()
        self.config = config
        scale = (2 * config.num_layers) ** -0.5  # two sublayers a layer add to the stream
        self.embeddings = PatchEmbeddings(config, init / "embeddings")
        self.layers = nn.ModuleList(
            ViTLayer(config, init / "layers" / number, scale) for number in range(config.num_layers)
        )
        self.layernorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Encode images of ``image_size`` pixels squared. Returns the last layer's output, normed, x_BSD."""
        x_BSD = self.embeddings(images_BCHW.to(self.layernorm.weight.dtype))
        for layer in self.layers:
            x_BSD = self._run_layer(layer, x_BSD)
        return self.layernorm(x_BSD)

    def _run_layer(self, layer: nn.Module, x_BSD: Tensor) -> Any:
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        return checkpoint(layer, x_BSD, use_reentrant=False) if recompute else layer(x_BSD)
