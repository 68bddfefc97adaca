"""Settings of ``multimodal``: encoders of texts and images, fused by cross-attention, for retrieval and classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from moe_scale.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Strict,
    divisors,
    setting,
)
from moe_scale.config.image_text_data import ImageTextDataConfig
from moe_scale.config.lora import LoRAConfig
from moe_scale.config.moe import MoEConfig
from moe_scale.config.run import EvalConfig, RunConfig
from moe_scale.errors import Problem


@dataclass(frozen=True)
class StackConfig:
    """What a stack of Transformer layers reads: that of the text or of the fusion."""

    d_model: int
    num_layers: int
    num_heads: int
    dropout: float
    norm: str
    norm_order: str
    norm_eps: float
    positions: str
    max_positions: int
    rope_theta: float
    activation_checkpointing: bool

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads


@dataclass(frozen=True)
class ImageEncoderConfig:
    """What a Vision Transformer reads (ViT, arXiv 2010.11929): pre-norm, layer norms, biases."""

    image_size: int
    patch_size: int
    d_model: int
    num_layers: int
    num_heads: int
    hidden: int
    dropout: float
    norm_eps: float
    activation_checkpointing: bool
    channels: int = 3

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class MultimodalModelConfig(Strict):
    """A text encoder and a Vision Transformer, and blocks of cross-attention that look at both."""

    goal: Literal["data", "retrieval", "classification", "regression"] = setting(
        "data",
        "retrieval (contrastive, and with fusion layers matching), classification or regression; data: what the labels "
        "of data.source are for",
    )
    inputs: Literal["data", "text", "image_text"] = setting("data", "what enters; data: what data.source has")
    num_outputs: NonNegativeInt = setting(0, "classes, or 1 for regression; 0 takes what data.source needs")
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = setting(
        8000, "rows of the text's embedding, and the entries that SentencePiece is trained to"
    )
    text_layers: PositiveInt = setting(4, "Transformer layers of the text encoder")
    text_width: PositiveInt = setting(256, "width of its residual stream (D)")
    text_heads: PositiveInt = setting(4, "its attention heads (H)")
    positions: Literal["alibi", "rotary", "sinusoidal", "learned"] = setting(
        "alibi",
        "of the text: alibi (scores of attention fall with the distance, the same both ways, arXiv 2108.12409), "
        "rotary, or a vector added to the embedding, fixed (sinusoidal) or learned",
    )
    max_positions: PositiveInt = setting(512, "positions=learned: tokens that a text may have")
    rope_theta: Annotated[float, Field(ge=0.1, le=1e12, allow_inf_nan=False)] = setting(
        10000.0, "positions=rotary: base of the angles"
    )
    image_size: NonNegativeInt = setting(0, "height and width of an image; 0 takes data.image_size")
    patch_size: PositiveInt = setting(8, "height and width of a patch, which is one position of the image encoder")
    image_layers: PositiveInt = setting(4, "Transformer layers of the image encoder")
    image_width: PositiveInt = setting(256, "width of its residual stream (D)")
    image_heads: PositiveInt = setting(4, "its attention heads (H)")
    image_hidden: NonNegativeInt = setting(0, "hidden width of its feed-forwards; 0 means 4 * image_width")
    image_norm_eps: PositiveFloat = setting(1e-12, "epsilon of its layer norms")
    vit_weights: PathText = setting(
        "",
        "folder of a Hugging Face ViT (config.json, model.safetensors) whose weights the image encoder begins with; "
        "empty draws them",
    )
    fusion_layers: NonNegativeInt = setting(2, "blocks of cross-attention between text and image; 0 means none")
    fusion_width: PositiveInt = setting(256, "width of their residual streams (D)")
    fusion_heads: PositiveInt = setting(4, "their attention heads (H)")
    experts_in: Literal["both", "text", "fusion"] = setting(
        "both", "where the sparse layers of moe.every are, which counts the layers of each from 1"
    )
    embed_size: PositiveInt = setting(256, "width of the space that texts and images are compared in (E)")
    pooling: Literal["first", "mean"] = setting(
        "first",
        "what stands for a text or an image as a whole: its first position (CLS), or the mean of its tokens or patches",
    )
    contrastive_weight: PositiveFloat = setting(1.0, "retrieval: weight of the contrastive loss")
    matching_weight: NonNegativeFloat = setting(
        1.0, "retrieval with fusion layers: weight of the loss of telling matching pairs from similar ones"
    )
    pretrained: PathText = setting(
        "",
        "run or checkpoint of this recipe whose weights the model begins with, as far as it has them, and whose "
        "vocabulary it takes: what it lacks (adapters, a new head) is drawn; empty draws all",
    )
    dropout: Fraction = setting(0.1, "of embeddings, attention weights, sublayers' outputs and what enters a head")
    norm: Literal["rmsnorm", "layernorm"] = setting(
        "rmsnorm", "of text and fusion: rmsnorm (arXiv 1910.07467) or layernorm, with bias"
    )
    norm_order: Literal["pre", "post"] = setting(
        "pre", "of text and fusion: norm before each sublayer and after the last layer (pre), or after each sublayer"
    )
    norm_eps: PositiveFloat = setting(1e-5, "of text and fusion: epsilon of every norm")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass instead of storing it")

    @property
    def has_images(self) -> bool:
        return self.inputs == "image_text"

    @property
    def has_fusion(self) -> bool:
        return self.has_images and self.fusion_layers > 0

    @property
    def text(self) -> StackConfig:
        return self._stack(self.text_width, self.text_layers, self.text_heads)

    @property
    def fusion(self) -> StackConfig:
        return self._stack(self.fusion_width, self.fusion_layers, self.fusion_heads)

    @property
    def image(self) -> ImageEncoderConfig:
        return ImageEncoderConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            d_model=self.image_width,
            num_layers=self.image_layers,
            num_heads=self.image_heads,
            hidden=self.image_hidden or 4 * self.image_width,
            dropout=self.dropout,
            norm_eps=self.image_norm_eps,
            activation_checkpointing=self.activation_checkpointing,
        )

    def _stack(self, width: int, layers: int, heads: int) -> StackConfig:
        return StackConfig(
            d_model=width,
            num_layers=layers,
            num_heads=heads,
            dropout=self.dropout,
            norm=self.norm,
            norm_order=self.norm_order,
            norm_eps=self.norm_eps,
            positions=self.positions,
            max_positions=self.max_positions,
            rope_theta=self.rope_theta,
            activation_checkpointing=self.activation_checkpointing,
        )

    def experts_of(self, part: Literal["text", "fusion"], moe: MoEConfig) -> MoEConfig:
        """The sparse layers' settings in one part of the model: dense where the experts are in the other one alone."""
        if self.experts_in in ("both", part):
            return moe
        return replace(moe, enabled=False, dense_size="active")

    def problems(self, where: str) -> list[Problem]:
        found = []
        parts = ["text", *(["image"] if self.has_images else []), *(["fusion"] if self.has_fusion else [])]
        for part in parts:
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                what = f"{heads} does not divide {where}.{part}_width = {width}"
                found.append(Problem(f"{where}.{part}_heads", what, f"choose one of {divisors(width)}"))
        if self.positions == "rotary" and not self.text_width % self.text_heads and self.text.head_width % 2:
            what = f"heads of the text are {self.text.head_width} wide, which is odd"
            found.append(Problem(f"{where}.text_heads", what, "rotary embedding turns pairs: choose an even width"))
        if self.has_images and self.image_size % self.patch_size:
            what = f"{self.patch_size} does not divide the images' {self.image_size} pixels"
            found.append(Problem(f"{where}.patch_size", what, f"choose one of {divisors(self.image_size)}"))
        return found + self._goal_problems(where)

    def _goal_problems(self, where: str) -> list[Problem]:
        found = []
        if self.goal == "retrieval" and self.has_fusion and not self.matching_weight:
            what = f"0 with {where}.fusion_layers = {self.fusion_layers}, which would learn nothing"
            found.append(Problem(f"{where}.matching_weight", what, f"choose more, or {where}.fusion_layers 0"))
        if self.goal == "classification" and self.has_images and not self.fusion_layers:
            what = "0, and a class is told from text and image together"
            found.append(Problem(f"{where}.fusion_layers", what, "choose 1 at least"))
        if self.vit_weights and not self.has_images:
            what = f"{self.vit_weights}, and no image enters"
            found.append(Problem(f"{where}.vit_weights", what, "leave it out"))
        return found


@dataclass(frozen=True)
class MultimodalEvalConfig(EvalConfig):
    """Evaluation on held-out images and texts."""

    every: NonNegativeInt = setting(200, "steps between evaluations; 0 evaluates at the end only")
    max_items: NonNegativeInt = setting(
        0, "images (for texts alone, examples) that each evaluation scores, at most; 0 means all held-out ones"
    )


@dataclass(frozen=True)
class MultimodalConfig(RunConfig):
    """A run of encoders of texts and images."""

    model: MultimodalModelConfig = setting(MultimodalModelConfig, "the encoders, their fusion and what is learned")
    lora: LoRAConfig = setting(LoRAConfig, "low-rank adapters")
    eval: MultimodalEvalConfig = setting(MultimodalEvalConfig, "evaluation")
    data: ImageTextDataConfig = setting(ImageTextDataConfig, "images and texts")

    def __post_init__(self) -> None:
        # Whoever reads config.model finds it whole: a checkpoint's settings describe the model without the data's.
        model, data = self.model, self.data
        resolved: dict[str, Any] = {
            "goal": data.goal if model.goal == "data" else model.goal,
            "inputs": ("image_text" if data.has_images else "text") if model.inputs == "data" else model.inputs,
            "num_outputs": model.num_outputs or data.num_outputs,
            "image_size": model.image_size or data.image_size,
        }
        object.__setattr__(self, "model", replace(model, **resolved))

    def problems(self) -> list[Problem]:
        found = super().problems() + self.model.problems("model") + self.data.problems("data")
        return found + self.lora.problems("lora") + self._moe_problems() + self._data_problems()

    def _moe_problems(self) -> list[Problem]:
        model, moe, found = self.model, self.moe, []
        if not moe.enabled:
            for part, layers in self._expert_stacks():
                found += moe.dense_size_problems("moe", f"model.{part}_layers", layers)
            return found
        if not self.sparse_layers:
            what = f"{moe.every}, with experts in {model.experts_in}: no layer is sparse"
            found.append(Problem("moe.every", what, "choose less, or moe.enabled false"))
        if moe.router == "hash" and any(part == "fusion" for part, _ in self._expert_stacks()):
            what = "hash with experts in the fusion: patches of images have no token ids"
            found.append(Problem("moe.router", what, "choose another router, or model.experts_in text"))
        return found + self.lora.moe_problems(moe)

    def _data_problems(self) -> list[Problem]:
        model, data, found = self.model, self.data, []
        given: dict[str, Any] = {"goal": data.goal, "inputs": "image_text" if data.has_images else "text"}
        given |= {"num_outputs": data.num_outputs}
        if data.has_images:
            given |= {"image_size": data.image_size}
        for name, value in given.items():
            if getattr(model, name) != value:
                what = f"{getattr(model, name)} with data.source = {data.source}, which takes {value}"
                found.append(Problem(f"model.{name}", what, "leave it out"))
        if model.positions == "learned" and data.max_len > model.max_positions:
            what = f"{model.max_positions} < data.max_len = {data.max_len}"
            found.append(Problem("model.max_positions", what, f"choose at least {data.max_len}"))
        return found

    def remarks(self) -> list[str]:
        found = super().remarks()
        if self.lora.enabled and not self.model.pretrained and not self.model.vit_weights:
            found.append("adapters are trained beside a model whose weights are drawn at random: set model.pretrained")
        if self.data.source == "sample" and self.scale != "cpu":
            found.append(f"scale {self.scale} will learn the sample's 1,600 training images by heart: set data.source")
        return found

    def _expert_stacks(self) -> list[tuple[str, int]]:
        """The parts that may have sparse layers, with their numbers of layers."""
        parts = [("text", self.model.text_layers)]
        parts += [("fusion", self.model.fusion_layers)] if self.model.has_fusion else []
        return [(part, layers) for part, layers in parts if self.model.experts_in in ("both", part)]

    @property
    def expert_widths(self) -> dict[str, int]:
        return {f"model.{part}_width": getattr(self.model, f"{part}_width") for part, _ in self._expert_stacks()}

    @property
    def sparse_layers(self) -> list[int]:
        """Numbers of the layers with experts; those of the fusion count on after the text's."""
        first = {"text": 0, "fusion": self.model.text_layers}
        return [
            first[part] + layer
            for part, layers in self._expert_stacks()
            for layer in range(layers)
            if self.moe.enabled and (layer + 1) % self.moe.every == 0
        ]
