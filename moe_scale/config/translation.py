"""Settings of ``translation``: an encoder-decoder model, its sentence pairs and its evaluation."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from moe_scale.config.base import (
    Fraction,
    NonEmptyText,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    head_problems,
    setting,
)
from moe_scale.config.run import EvalConfig, RunConfig
from moe_scale.errors import Problem


@dataclass(frozen=True)
class Seq2SeqConfig(Strict):
    """An encoder-decoder Transformer (arXiv 1706.03762) with one embedding for source, target and head."""

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = setting(
        32_000, "rows of the embedding, and the entries that SentencePiece is trained to"
    )
    num_encoder_layers: PositiveInt = setting(6, "Transformer layers of the encoder")
    num_decoder_layers: PositiveInt = setting(6, "Transformer layers of the decoder")
    d_model: PositiveInt = setting(512, "width of the residual stream (D)")
    num_heads: PositiveInt = setting(8, "attention heads (H)")
    head_dim: NonNegativeInt = setting(0, "width of a head (A); 0 means d_model / num_heads")
    positions: Literal["rotary", "sinusoidal", "learned"] = setting(
        "rotary",
        "rotary (of queries and keys in self-attention, arXiv 2104.09864), or a vector added to the embedding, fixed "
        "(sinusoidal) or learned",
    )
    max_positions: PositiveInt = setting(512, "positions=learned: tokens that a sentence may have")
    rope_theta: Annotated[float, Field(ge=0.1, le=1e12, allow_inf_nan=False)] = setting(
        10000.0, "positions=rotary: base of the angles"
    )
    norm: Literal["rmsnorm", "layernorm"] = setting("rmsnorm", "rmsnorm (arXiv 1910.07467) or layernorm, with bias")
    norm_order: Literal["pre", "post"] = setting(
        "pre", "norm before each sublayer and after the last layer (pre), or after each sublayer (post)"
    )
    norm_eps: PositiveFloat = setting(1e-5, "epsilon of every norm")
    dropout: Fraction = setting(0.1, "of embeddings, attention weights and sublayers' outputs")
    label_smoothing: Fraction = setting(0.1, "share of each target's probability that is spread over the vocabulary")
    experts_in: Literal["both", "encoder", "decoder"] = setting("both", "where the sparse layers of moe.every are")
    activation_checkpointing: bool = setting(False, "recompute each layer in the backward pass instead of storing it")
    loss_chunk_tokens: PositiveInt = setting(1024, "tokens whose logits are held at once; lower saves memory")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    def problems(self, where: str) -> list[Problem]:
        rotary = self.positions == "rotary"
        return head_problems(where, self.d_model, "d_model", self.num_heads, self.head_dim, rotary=rotary)


_LANGUAGE = re.compile(r"[a-z]{2,3}")


def is_direction(pair: str) -> bool:
    """Whether it names two different languages, source first, as ``en-de``."""
    source, _, target = pair.partition("-")
    return bool(_LANGUAGE.fullmatch(source) and _LANGUAGE.fullmatch(target)) and source != target


@dataclass(frozen=True)
class PairDataConfig(Strict):
    """Sentence pairs: where they are, which directions are learned, how they are tokenized, split and batched."""

    source: NonEmptyText = setting(
        "sample",
        "sample (messages of a program in 16 languages, installed from the package index), opus_books (Hugging Face "
        "hub), or a path: a file or a folder of .tsv or .jsonl(.gz) files, or of text files whose lines correspond, "
        "as books.en and books.de",
    )
    pairs: tuple[str, ...] = setting(
        (),
        "directions, as en-de de-en; none given means all that a file or folder holds, and for the sample English "
        "into its 15 other languages; opus_books has to be told",
    )
    tokenizer: Literal["unigram", "bpe"] = setting(
        "unigram", "SentencePiece model, trained on the training sentences and kept in the run's folder"
    )
    batch_tokens: PositiveInt = setting(
        128,
        "tokens of both sides, padding included, that one unit of the DeepSpeed JSON's micro-batch size stands for: a "
        "micro-batch is filled with as many pairs of similar length as fit",
    )
    max_len: PositiveInt = setting(128, "tokens of a side, at most; longer pairs are counted and left out")
    pair_temperature: PositiveFloat = setting(
        1.0, "a direction with n pairs is drawn in proportion to n^(1/temperature): 1 as they are, 5 almost evenly"
    )
    valid_fraction: Fraction = setting(0.02, "share of the source sentences held out for evaluation during training")
    test_fraction: Fraction = setting(0.05, "share of the source sentences held out for the end of the run")
    cache_dir: NonEmptyText = setting("~/.cache/moe_scale", "folder for tokenized pairs; safe to delete")

    def problems(self, where: str) -> list[Problem]:
        found = []
        for pair in itertools.filterfalse(is_direction, self.pairs):
            found.append(Problem(f"{where}.pairs", repr(pair), "write two different language codes, as en-de"))
        repeated = [pair for pair, same in itertools.groupby(sorted(self.pairs)) if len(list(same)) > 1]
        found += [Problem(f"{where}.pairs", f"{pair} is named twice", "name it once") for pair in repeated]
        for name in ("valid_fraction", "test_fraction"):
            if not getattr(self, name):
                found.append(Problem(f"{where}.{name}", "0 leaves no sentence to evaluate on", "choose more than 0"))
        if self.valid_fraction + self.test_fraction >= 1:
            both = f"{where}.valid_fraction + {where}.test_fraction = {self.valid_fraction + self.test_fraction:g}"
            found.append(Problem(f"{where}.test_fraction", f"{both} leaves nothing to train on", "choose less"))
        return found


@dataclass(frozen=True)
class TranslationEvalConfig(EvalConfig):
    """Evaluation on held-out sentence pairs: loss, BLEU and chrF."""

    bleu_sentences: NonNegativeInt = setting(
        100, "validation sentences a direction, at most, that each evaluation translates greedily; 0 skips it"
    )
    test_sentences: NonNegativeInt = setting(
        0, "test sentences a direction, at most, that are translated at the end of the run; 0 means all"
    )
    beam_size: PositiveInt = setting(4, "beam of the search at the end of the run")
    length_penalty: NonNegativeFloat = setting(
        1.0, "a hypothesis of n tokens is ranked by log p / n^penalty: 0 prefers short ones, 1 is the mean"
    )
    max_len_ratio: PositiveFloat = setting(
        2.0, "a translation ends after so many times the tokens of its source, and 10 more"
    )


@dataclass(frozen=True)
class TranslationConfig(RunConfig):
    """A run of an encoder-decoder model on sentence pairs."""

    model: Seq2SeqConfig = setting(Seq2SeqConfig, "the encoder and decoder")
    eval: TranslationEvalConfig = setting(TranslationEvalConfig, "evaluation")
    data: PairDataConfig = setting(PairDataConfig, "the sentence pairs")

    def problems(self) -> list[Problem]:
        found = super().problems() + self.model.problems("model") + self.data.problems("data")
        model, moe = self.model, self.moe
        if moe.enabled and not self.sparse_layers:
            found.append(
                Problem(
                    "moe.every",
                    f"{moe.every} > layers of the {'model' if model.experts_in == 'both' else model.experts_in}: "
                    "no layer is sparse",
                    "choose less, or moe.enabled false",
                )
            )
        if moe.enabled and moe.router == "expert_choice" and model.experts_in != "encoder":
            found.append(
                Problem(
                    "moe.router",
                    f"expert_choice with model.experts_in = {model.experts_in}",
                    "experts would choose among later words of the translation, which are not there when it is "
                    "written: set model.experts_in encoder, or choose another router",
                )
            )
        if model.positions == "learned" and self.longest_sequence > model.max_positions:
            found.append(
                Problem(
                    "model.max_positions",
                    f"{model.max_positions} < {self.longest_sequence}, the longest sequence that data.max_len = "
                    f"{self.data.max_len} and eval.max_len_ratio = {self.eval.max_len_ratio:g} allow",
                    f"choose at least {self.longest_sequence}, or other model.positions",
                )
            )
        for part in ("encoder", "decoder"):
            if model.experts_in in ("both", part):
                name = f"num_{part}_layers"
                found += moe.dense_size_problems("moe", f"model.{name}", getattr(model, name))
        return found

    def remarks(self) -> list[str]:
        found = super().remarks()
        if self.moe.enabled and self.moe.dispatch == "capacity":
            found.append(
                "moe.dispatch capacity: the tokens of a batch compete for the experts' places, so a translation can "
                "depend on the other sentences of its batch"
            )
        return found

    @property
    def sparse_layers(self) -> list[int]:
        """Numbers of the layers with experts; the decoder's follow the encoder's."""
        model = self.model
        sizes = {"encoder": model.num_encoder_layers, "decoder": model.num_decoder_layers}
        found, first = [], 0
        for part, size in sizes.items():
            if self.moe.enabled and model.experts_in in ("both", part):
                found += [first + layer for layer in range(size) if (layer + 1) % self.moe.every == 0]
            first += size
        return found

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest source (with its language tag and end) or translation."""
        source_tokens = self.data.max_len + 2
        return max(source_tokens, self.max_target_len(source_tokens))

    def max_target_len(self, source_tokens: int) -> int:
        """Tokens after which the translation of a source of so many, language tag and end included, is cut off."""
        return int(self.eval.max_len_ratio * source_tokens) + 10
