"""Settings of ``switch``: a Switch Transformer (arXiv 2101.03961) on text, as causal or as denoising language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

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
    head_problems,
    setting,
)
from moe_scale.config.language_model import TextDataConfig
from moe_scale.config.moe import MoEConfig
from moe_scale.config.run import EvalConfig, RunConfig
from moe_scale.errors import Problem

Activation = Literal["swiglu", "gelu", "relu"]
Dispatch = Literal["dropless", "capacity"]


@dataclass(frozen=True)
class SwitchModelConfig(Strict):
    """Layers of ``torch.nn.TransformerEncoderLayer``, every n-th with experts, over a tied embedding."""

    objective: Literal["causal", "span_corruption"] = setting(
        "causal",
        "causal: predict the next token; span_corruption: say what was cut out of a text that is seen whole (arXiv "
        "1910.10683, section 3.1.4), as a prefix language model (section 3.2.1 there)",
    )
    vocab_size: PositiveInt = setting(384, "rows of the embedding: at least the tokenizer's entries and the sentinels")
    num_layers: PositiveInt = setting(4, "Transformer layers")
    d_model: PositiveInt = setting(128, "width of the residual stream (D)")
    num_heads: PositiveInt = setting(4, "attention heads (H)")
    dropout: Fraction = setting(0.1, "of what enters, attention weights, sublayers' outputs, dense hidden layers")
    bias: bool = setting(False, "biases in attention, norms and dense feed-forwards; of experts: moe.expert_bias")
    norm_order: Literal["pre", "post"] = setting(
        "pre", "norm before each sublayer and after the last layer (pre), or after each sublayer (post)"
    )
    norm_eps: PositiveFloat = setting(1e-5, "epsilon of every LayerNorm")
    positions: Literal["alibi", "sinusoidal", "learned"] = setting(
        "alibi",
        "alibi (attention scores fall with the distance, arXiv 2108.12409), or a vector added to each token's, fixed "
        "(sinusoidal) or learned",
    )
    max_positions: PositiveInt = setting(1024, "positions=learned: positions that a sequence may have")
    init_scale: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = setting(
        0.1,
        "s of the layers' initial weights, of standard deviation sqrt(s / inputs); Switch takes 0.1, a tenth of the "
        "usual (after 3,500 steps -2.72 +- 0.01 in log perplexity against -3.60 +- 0.68, table 3 there)",
    )
    noise_density: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.15, "objective=span_corruption: share of the tokens that is cut out"
    )
    mean_span_length: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = setting(
        3.0, "objective=span_corruption: tokens of a span, on average"
    )
    num_sentinels: Annotated[int, Field(ge=2, le=10_000)] = setting(
        100, "objective=span_corruption: entries after the tokenizer's own that stand for spans"
    )
    pretrained: PathText = setting(
        "",
        "run, checkpoint or model folder whose weights the model begins with, as far as it has them: what it lacks is "
        "drawn; its tokenizer has to be data.tokenizer; empty draws all",
    )
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass instead of storing it")
    loss_chunk_tokens: PositiveInt = setting(2048, "tokens whose logits are held at once; lower saves memory")

    @property
    def head_width(self) -> int:
        return self.d_model // self.num_heads

    @property
    def norm(self) -> str:
        return "layernorm"

    @property
    def is_causal(self) -> bool:
        return self.objective == "causal"

    def span_lengths(self, text_tokens: int) -> tuple[int, int]:
        """Tokens cut out of ``text_tokens``, and spans that they form: the same for every text of this length."""
        noise = min(max(round(text_tokens * self.noise_density), 1), text_tokens - 1)
        spans = min(max(round(noise / self.mean_span_length), 1), noise, text_tokens - noise)
        return noise, spans

    def problems(self, where: str) -> list[Problem]:
        return head_problems(where, self.d_model, "d_model", self.num_heads, None, rotary=False)


@dataclass(frozen=True)
class SwitchMoEConfig(MoEConfig):
    """The mixture-of-experts layer with the defaults of Switch Transformers."""

    may_be_swiglu: ClassVar[bool] = False  # torch's layer has none

    num_experts: PositiveInt = setting(8, "experts per layer (E)")
    top_k: PositiveInt = setting(1, "experts that each token is sent to (K); Switch: 1")
    intermediate_size: PositiveInt = setting(512, "hidden width of one expert (F)")
    activation: Activation = setting("relu", "of the experts and of dense feed-forwards: relu or gelu")
    every: PositiveInt = setting(
        2, "every n-th layer is sparse, counted from the end of each group of n; Switch: 2; 1 = all"
    )
    dispatch: Dispatch = setting(
        "capacity",
        "capacity: experts take at most capacity_factor times their share, the rest pass by; dropless: all of them",
    )
    capacity_factor: PositiveFloat = setting(
        1.25,
        "with dispatch=capacity: rows per expert = ceil(tokens * top_k / num_experts * capacity_factor); Switch "
        "compares 1.0, 1.25 and 2.0, which end at log perplexities of -1.561, -1.553 and -1.554 (table 1 there)",
    )
    eval_capacity_factor: PositiveFloat = setting(2.0, "the same at evaluation")
    aux_loss_weight: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] = setting(
        0.01, "weight of the load-balancing loss E * sum_e f_e * P_e; Switch: 0.01"
    )
    z_loss_weight: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] = setting(
        0.0, "weight of the router z-loss mean(logsumexp(logits)^2); ST-MoE (arXiv 2202.08906): 0.001; Switch: none"
    )


@dataclass(frozen=True)
class SwitchTextDataConfig(TextDataConfig):
    """Text for a Switch Transformer."""

    tokenizer: NonEmptyText = setting(
        "bytes",
        "bytes (257 entries: a token a byte, arXiv 2105.13626), gpt2 (exact byte-level BPE, 50,257 entries), a folder "
        "with a tokenizer, or a name on the Hugging Face hub",
    )
    seq_len: PositiveInt = setting(
        256, "tokens of text in a sequence; with span_corruption the model reads this text cut, and writes what was cut"
    )


@dataclass(frozen=True)
class SwitchEvalConfig(EvalConfig):
    """Evaluation on held-out text."""

    max_tokens: Count = setting(1_000_000, "held-out tokens scored per evaluation, at most, over all ranks")
    prompt: str = setting(
        "ROMEO.\n",
        "text that the sample at the end of the run continues; with span_corruption <extra_id_0>, <extra_id_1> ... "
        "stand for what is missing, and a prompt without any is skipped; empty skips it",
    )
    sample_tokens: NonNegativeInt = setting(200, "tokens generated at the end of the run; 0 skips it")


@dataclass(frozen=True)
class SwitchConfig(RunConfig):
    """A run of a Switch Transformer."""

    model: SwitchModelConfig = setting(SwitchModelConfig, "the Transformer")
    moe: SwitchMoEConfig = setting(SwitchMoEConfig, "the mixture-of-experts layer")
    eval: SwitchEvalConfig = setting(SwitchEvalConfig, "evaluation")
    data: SwitchTextDataConfig = setting(SwitchTextDataConfig, "the text")

    def problems(self) -> list[Problem]:
        model, moe = self.model, self.moe
        found = super().problems() + model.problems("model") + self.data.problems("data")
        if moe.activation == "swiglu":
            found.append(Problem("moe.activation", "swiglu: torch's layer has none", "choose relu or gelu"))
        if not model.is_causal:
            found += self._span_problems()
        longest = self.sequence_length
        if model.positions == "learned" and model.max_positions < longest:
            what = f"{model.max_positions} < {longest}, the longest sequence"
            found.append(Problem("model.max_positions", what, f"choose at least {longest}"))
        stack = "moe", "model.num_layers", model.num_layers
        return found + moe.every_problems(*stack) + moe.dense_size_problems(*stack)

    def _span_problems(self) -> list[Problem]:
        model, text = self.model, self.data.seq_len
        if text < 2:
            return [Problem("data.seq_len", f"{text}: there is nothing to cut a span out of", "choose at least 2")]
        found = []
        if self.eval.max_tokens < text:
            what = f"{self.eval.max_tokens} < data.seq_len = {text}: no whole text would be scored"
            found.append(Problem("eval.max_tokens", what, f"choose at least {text}"))
        spans = model.span_lengths(text)[1]
        if spans + 1 > model.num_sentinels:
            what = f"{model.num_sentinels} < {spans + 1}: {spans} spans of data.seq_len = {text}, and one for the end"
            found.append(Problem("model.num_sentinels", what, f"choose at least {spans + 1}, or longer spans"))
        return found

    def remarks(self) -> list[str]:
        found = super().remarks()
        if self.moe.enabled and self.moe.router == "expert_choice":
            found.append(
                "moe.router expert_choice looks at later tokens of a sequence to decide on earlier ones: a causal "
                "model's loss is then too good"
            )
        return found

    @property
    def prefix_length(self) -> int:
        """Tokens of a training sequence that see each other: the text with its spans cut out; 0 of a causal model."""
        if self.model.is_causal:
            return 0
        noise, spans = self.model.span_lengths(self.data.seq_len)
        return self.data.seq_len - noise + spans

    @property
    def sequence_length(self) -> int:
        """Tokens that the model reads of a training sequence."""
        if self.model.is_causal:
            return self.data.seq_len
        noise, spans = self.model.span_lengths(self.data.seq_len)
        return self.prefix_length + noise + spans  # the end's sentinel is only a target
