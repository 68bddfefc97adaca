"""Settings of ``classifier``: an encoder that gives a text or a sequence of features one of several classes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from moe_scale.config.base import (
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
from moe_scale.config.moe import MoEConfig
from moe_scale.config.run import EvalConfig, RunConfig
from moe_scale.errors import Problem

ENCODER_VOCABULARY, ENCODER_WIDTH = 30_522, 384
"""Entries and width of the token embeddings of the installed sentence encoder, all-MiniLM-L6-v2."""


@dataclass(frozen=True)
class ClassifierModelConfig(Strict):
    """A Transformer encoder with experts, a pooled sequence, and a linear map to the classes."""

    input_size: PositiveInt = setting(
        128, "width of what enters: of each position's features, or of the token embedding of text"
    )
    hidden_size: PositiveInt = setting(128, "width of the residual stream (D) and hidden width of one expert (F)")
    output_size: Annotated[int, Field(ge=2, le=100_000)] = setting(2, "classes")
    num_experts: PositiveInt = setting(8, "experts per layer (E); what moe.num_experts is elsewhere")
    k: PositiveInt = setting(2, "experts that each position is sent to (K); what moe.top_k is elsewhere")
    num_layers: PositiveInt = setting(2, "Transformer layers")
    dropout: Fraction = setting(0.1, "of what enters, attention weights, sublayers' outputs and the pooled sequence")
    temperature: PositiveFloat = setting(
        1.0, "the router's scores are divided by it; what moe.router_temperature is elsewhere"
    )
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = setting(
        8000, "text: rows of the embedding, and the entries that SentencePiece is trained to"
    )
    embeddings: Literal["random", "encoder"] = setting(
        "random",
        "text: how the token embedding begins; encoder: as that of a sentence encoder (all-MiniLM-L6-v2, installed "
        "from the package index), which takes data.tokenizer encoder, input_size 384 and vocab_size 30522",
    )
    num_heads: PositiveInt = setting(4, "attention heads (H)")
    head_dim: NonNegativeInt = setting(0, "width of a head (A); 0 means hidden_size / num_heads")
    positions: Literal["rotary", "sinusoidal", "learned"] = setting(
        "rotary",
        "rotary (of queries and keys, arXiv 2104.09864), or a vector added to what enters, fixed (sinusoidal) or "
        "learned",
    )
    max_positions: PositiveInt = setting(512, "positions=learned: positions that a sequence may have")
    rope_theta: Annotated[float, Field(ge=0.1, le=1e12, allow_inf_nan=False)] = setting(
        10000.0, "positions=rotary: base of the angles"
    )
    pooling: Literal["mean", "attention"] = setting(
        "mean", "one vector a sequence: the mean of its positions, or their mean weighted by a learned query"
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "rmsnorm (arXiv 1910.07467) or layernorm, with bias")
    norm_order: Literal["pre", "post"] = setting(
        "pre", "norm before each sublayer and after the last layer (pre), or after each sublayer (post)"
    )
    norm_eps: PositiveFloat = setting(1e-5, "epsilon of every norm")
    position_dropout: Fraction = setting(0.0, "share of the positions whose input is blanked in training")
    label_smoothing: Fraction = setting(0.0, "share of each label's probability that is spread over all classes")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass instead of storing it")

    @property
    def d_model(self) -> int:
        return self.hidden_size

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def problems(self, where: str) -> list[Problem]:
        rotary = self.positions == "rotary"
        return head_problems(where, self.hidden_size, "hidden_size", self.num_heads, self.head_dim, rotary=rotary)


OWN_NAMES = {
    "num_experts": "num_experts",
    "top_k": "k",
    "router_temperature": "temperature",
    "intermediate_size": "hidden_size",
}
"""What the sparse layer's settings are called in :class:`ClassifierModelConfig`, where a user sets them."""


@dataclass(frozen=True)
class ClassifierMoEConfig(MoEConfig):
    """The settings of the sparse layer that the model's section does not have already."""

    num_experts: int = field(init=False, default=8)
    top_k: int = field(init=False, default=2)
    router_temperature: float = field(init=False, default=1.0)
    intermediate_size: int = field(init=False, default=128)


def complete_moe(moe: MoEConfig, model: ClassifierModelConfig) -> MoEConfig:
    """The sparse layer's settings as every other part of the project reads them."""
    own = {f.name: getattr(moe, f.name) for f in dataclasses.fields(moe) if f.name not in OWN_NAMES}
    return MoEConfig(**own, **{name: getattr(model, own_name) for name, own_name in OWN_NAMES.items()})


SYNTHETIC, RANDOM_LABELS = "synthetic", "synthetic-random-labels"


@dataclass(frozen=True)
class ExampleDataConfig(Strict):
    """Labelled examples: where they are, how they are read, tokenized, split and batched."""

    source: NonEmptyText = setting(
        "sample",
        "sample (sentences of film reviews, installed from the package index), glue/TASK (as glue/sst2, from the "
        "Hugging Face hub), synthetic (sequences of features whose label depends on their order), "
        "synthetic-random-labels (a control: nothing can be learned from it), or a path: a .csv, .tsv or .jsonl(.gz) "
        "file",
    )
    heldout: PathText = setting(
        "",
        "path as a source: the file that is held out for the end of the run; empty takes test_fraction of the source",
    )
    text_fields: tuple[str, ...] = setting(("text",), "columns or JSON fields with the text; several are read in a row")
    features_field: str = setting(
        "", "JSON field with a list of input_size numbers for each position, instead of text; empty means text"
    )
    label_field: NonEmptyText = setting("label", "column or JSON field with the class, a whole number from 0")
    tokenizer: Literal["unigram", "bpe", "encoder"] = setting(
        "unigram",
        "SentencePiece model, trained on the training text and kept in the run's folder, or the vocabulary of the "
        "installed sentence encoder",
    )
    text_form: Literal["folded", "as_is"] = setting(
        "folded", "folded: in lower case, punctuation apart from words; as_is: only white space and HTML are tidied"
    )
    max_len: PositiveInt = setting(128, "positions of a sequence, at most; longer ones are counted and cut off")
    batch_examples: PositiveInt = setting(
        8, "examples that one unit of the DeepSpeed JSON's micro-batch size stands for"
    )
    valid_fraction: Fraction = setting(0.1, "share of the training examples held out for evaluation during training")
    test_fraction: Fraction = setting(
        0.1, "share held out for the end of the run, where the source has no held-out examples of its own"
    )
    synthetic_examples: Annotated[int, Field(ge=10, le=10_000_000)] = setting(
        12_000, "synthetic: sequences, of data.max_len positions each at most"
    )
    synthetic_seed: NonNegativeInt = setting(0, "synthetic: seed of the sequences")
    cache_dir: NonEmptyText = setting("~/.cache/moe_scale", "folder for prepared examples; safe to delete")

    @property
    def has_features(self) -> bool:
        """Whether the examples are sequences of features instead of text."""
        return self.is_synthetic or bool(self.features_field)

    @property
    def is_synthetic(self) -> bool:
        return self.source in (SYNTHETIC, RANDOM_LABELS)

    @property
    def is_path(self) -> bool:
        return not self.is_synthetic and self.source != "sample" and not self.source.startswith("glue/")

    def problems(self, where: str) -> list[Problem]:
        found = []
        if not self.valid_fraction:
            found.append(Problem(f"{where}.valid_fraction", "0 leaves no example to evaluate on", "choose more than 0"))
        own_heldout = not self.is_synthetic and not (self.is_path and not self.heldout)
        test_fraction = 0.0 if own_heldout else self.test_fraction
        if not own_heldout and not self.test_fraction:
            what = f"0, and {self.source} has no held-out examples of its own"
            found.append(Problem(f"{where}.test_fraction", what, f"choose more than 0, or set {where}.heldout"))
        if self.valid_fraction + test_fraction >= 1:
            both = f"{where}.valid_fraction + {where}.test_fraction = {self.valid_fraction + test_fraction:g}"
            found.append(Problem(f"{where}.test_fraction", f"{both} leaves nothing to train on", "choose less"))
        if self.heldout and not self.is_path:
            what = f"{self.heldout}, and {where}.source = {self.source} has held-out examples of its own"
            found.append(Problem(f"{where}.heldout", what, f"leave it out, or set {where}.source to a file"))
        if self.features_field and not self.is_path:
            what = f"{self.features_field} with {where}.source = {self.source}"
            found.append(Problem(f"{where}.features_field", what, f"set {where}.source to a file of JSON lines"))
        own_fields = {"text_fields": ("text",), "label_field": "label"}
        for name, usual in own_fields.items():
            if not self.is_path and getattr(self, name) != usual:
                what = f"{getattr(self, name)} with {where}.source = {self.source}, which has fields of its own"
                found.append(Problem(f"{where}.{name}", what, f"leave it out, or set {where}.source to a file"))
        if not self.text_fields:
            found.append(Problem(f"{where}.text_fields", "none", "name one at least"))
        if self.is_synthetic and self.max_len < 4:
            found.append(Problem(f"{where}.max_len", f"{self.max_len} with {self.source}", "choose 4 at least"))
        return found


@dataclass(frozen=True)
class ClassifierEvalConfig(EvalConfig):
    """Evaluation on held-out examples."""

    every: NonNegativeInt = setting(100, "steps between evaluations; 0 evaluates at the end only")
    max_examples: NonNegativeInt = setting(
        0, "examples that each evaluation scores, at most; 0 means all. The end of the run scores all in any case"
    )
    baseline: bool = setting(
        True, "at the end, fit a logistic regression (of TF-IDF, or of the features' mean) to compare with"
    )


@dataclass(frozen=True)
class ClassifierConfig(RunConfig):
    """A run of an encoder on labelled examples."""

    model: ClassifierModelConfig = setting(ClassifierModelConfig, "the encoder and its classes")
    moe: ClassifierMoEConfig = setting(ClassifierMoEConfig, "the mixture-of-experts layer")
    eval: ClassifierEvalConfig = setting(ClassifierEvalConfig, "evaluation")
    data: ExampleDataConfig = setting(ExampleDataConfig, "the examples")

    def __post_init__(self) -> None:
        # Whoever reads config.moe finds it whole; what the model's section says is set nowhere else.
        object.__setattr__(self, "moe", complete_moe(self.moe, self.model))

    def problems(self) -> list[Problem]:
        found = super().problems() + self.model.problems("model") + self.data.problems("data")
        model, moe, data = self.model, self.moe, self.data
        found += moe.every_problems("moe", "model.num_layers", model.num_layers)
        if moe.enabled and moe.router == "hash" and data.has_features:
            what = f"hash with data.source = {data.source}: features have no token ids"
            found.append(Problem("moe.router", what, "choose another router"))
        if model.positions == "learned" and data.max_len > model.max_positions:
            what = f"{model.max_positions} < data.max_len = {data.max_len}"
            found.append(Problem("model.max_positions", what, f"choose at least {data.max_len}"))
        return self.in_own_words(found + self._embedding_problems())

    def _embedding_problems(self) -> list[Problem]:
        model, data, found = self.model, self.data, []
        if data.has_features:
            if model.embeddings != "random":
                what = f"{model.embeddings} with data.source = {data.source}, which has no tokens"
                found.append(Problem("model.embeddings", what, "choose random"))
            return found
        if model.embeddings == "encoder" and data.tokenizer != "encoder":
            what = f"{data.tokenizer} with model.embeddings = encoder, which has a vocabulary of its own"
            found.append(Problem("data.tokenizer", what, "choose encoder"))
        if model.embeddings == "encoder" and model.input_size != ENCODER_WIDTH:
            what = f"{model.input_size} with model.embeddings = encoder, which is {ENCODER_WIDTH} wide"
            found.append(Problem("model.input_size", what, f"choose {ENCODER_WIDTH}"))
        if data.tokenizer == "encoder" and model.vocab_size != ENCODER_VOCABULARY:
            what = f"{model.vocab_size} with data.tokenizer = encoder, which has {ENCODER_VOCABULARY} entries"
            found.append(Problem("model.vocab_size", what, f"choose {ENCODER_VOCABULARY}"))
        return found

    def in_own_words(self, problems: list[Problem]) -> list[Problem]:
        return [replace(p, where=_own(p.where), what=_own(p.what), allowed=_own(p.allowed)) for p in problems]

    @property
    def expert_widths(self) -> dict[str, int]:
        return {}  # hidden_size, which is the experts' own width as well

    @property
    def sparse_layers(self) -> list[int]:
        """Numbers of the layers with experts."""
        return [n for n in range(self.model.num_layers) if self.moe.enabled and (n + 1) % self.moe.every == 0]


def _own(text: str) -> str:
    for name, own_name in OWN_NAMES.items():
        text = text.replace(f"moe.{name}", f"model.{own_name}")
    return text
