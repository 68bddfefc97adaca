"""The task of ``switch``: a Switch Transformer on text, which it continues, or fills in where spans were cut out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_scale.config import SwitchConfig
from moe_scale.data.sentinels import encode_with_sentinels, with_sentinels
from moe_scale.data.span_corruption import CorruptedLoader, SpanCorruption, restore
from moe_scale.data.text import Batch, PreparedText
from moe_scale.data.tokenizer import TextTokenizer, load_tokenizer
from moe_scale.errors import ConfigError, Problem
from moe_scale.models.decoder import LMOutput
from moe_scale.models.layers import is_sparse
from moe_scale.models.switch import SwitchLM
from moe_scale.models.switch_counts import num_active_params, num_params, training_flops_per_token
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.train.text import TextTask, inputs_of, summary_of_scores

_HELDOUT_SEED = 0
"""Of where held-out texts are cut: the same for all runs, whose scores so are of the same targets."""


class SwitchTask(TextTask):
    """Train a :class:`SwitchLM` on packed documents, or on texts with spans cut out."""

    model_kind = "switch"

    def __init__(self, config: SwitchConfig):
        model = config.model
        super().__init__(config, own_entries=0 if model.is_causal else model.num_sentinels)
        if not model.is_causal:
            del self.scores["eval/bits_per_byte"]  # a span's bytes are known, those of a sentinel are not
        self.prefix = config.prefix_length
        self.tokens_per_sequence = config.sequence_length
        self.flops_per_token = training_flops_per_token(model, config.moe, config.sequence_length, self.prefix)
        self.sparse_layers = [n for n in range(model.num_layers) if is_sparse(config.moe, n)]

    def check(self) -> list[Problem]:
        found = super().check()
        if self.config.model.is_causal or found:
            return found
        try:
            plain = load_tokenizer(self.config.data.tokenizer)
            tokenizer = with_sentinels(plain, self.config.model.num_sentinels)
            if self.config.eval.sample_tokens:
                self._prompt(tokenizer, plain.vocab_size)
        except ConfigError as error:
            return error.problems
        return []

    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        super().open(micro_batch=micro_batch, rank=rank, world_size=world_size)
        if self.config.model.is_causal:
            return
        self._require_whole_heldout_text()
        first = self.tokenizer.vocab_size
        self.tokenizer = with_sentinels(self.tokenizer, self.config.model.num_sentinels)
        self.first_sentinel = first
        corruption = SpanCorruption(self.config, first, self.config.seed)
        self.loader = CorruptedLoader(self.loader, corruption, micro_batch=micro_batch, rank=rank)

    def _require_whole_heldout_text(self) -> None:
        """What is shorter than ``data.seq_len`` is not scored.

        Raises:
            ConfigError: at ``data.holdout_fraction``, when there would be no score.
        """
        needed, text = self.config.data.seq_len, self.text
        heldout = text.heldout if isinstance(text, PreparedText) else text.heldout(self.config.eval.max_tokens)
        if heldout.num_tokens <= needed:
            what = f"the held-out text has {heldout.num_tokens} tokens, not a whole one of data.seq_len = {needed}"
            raise ConfigError(Problem("data.holdout_fraction", what, "choose more, or a shorter data.seq_len"))

    def draw_model(self, groups: ParallelGroups | None = None) -> SwitchLM:
        return SwitchLM(self.config.model, self.config.moe, groups, self.config.seed)

    def forward(self, engine: Any, batch: Batch) -> LMOutput:
        inputs, known = inputs_of(batch)
        return engine(*inputs, **known, prefix=self.prefix)

    def heldout(self) -> Iterator[Batch]:
        texts = super().heldout()
        if self.config.model.is_causal:
            yield from texts
            return
        corruption = SpanCorruption(self.config, self.first_sentinel, _HELDOUT_SEED)
        for place, batch in enumerate(texts):
            rows = range(place * self.micro_batch, (place + 1) * self.micro_batch)
            yield corruption.batch(batch, [row * self.world_size + self.rank for row in rows])

    def evaluate(self, engine: Any) -> dict[str, Any]:
        def model(ids_BS: Any, targets_BS: Any, documents_BS: Any, *, want_sink: bool) -> LMOutput:
            return engine(ids_BS, targets_BS, documents_BS, prefix=self.prefix)

        scores = self.scored(engine, model).record()
        if not self.config.model.is_causal:
            del scores["eval/bits_per_byte"]
        return scores

    def summarize(self, engine: Any, scores: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        config = self.config
        counts = num_params(config.model, config.moe), num_active_params(config.model, config.moe)
        lines = summary_of_scores(*counts, scores)
        if not config.eval.sample_tokens or not config.eval.prompt:
            return lines
        if config.model.is_causal:
            return [*lines, ("sample", self.continued(engine))]
        prompt = self._prompt(self.tokenizer, self.first_sentinel)
        return [*lines, ("sample", self._filled_in(engine, prompt))] if prompt else lines

    def _filled_in(self, engine: Any, prompt: list[int]) -> str:
        """The prompt with what the model writes in place of its sentinels."""
        model = functools.partial(engine, prefix=len(prompt), last_only=True)
        length = self.config.sequence_length
        written = self.sampled(engine, model, prompt, min(self.config.eval.sample_tokens, length - len(prompt)), length)
        end = max(prompt) + 1  # the sentinel after the last one of the prompt
        return self.tokenizer.decode(restore(prompt, written[: (*written, end).index(end)], self.first_sentinel))

    def _prompt(self, tokenizer: TextTokenizer, first_sentinel: int) -> list[int]:
        """The prompt of the settings; empty where it has no sentinel.

        Raises:
            ConfigError: at ``eval.prompt``, when it names a sentinel that there is not, or is too long.
        """
        prompt = encode_with_sentinels(tokenizer, self.config.eval.prompt, first_sentinel, "eval.prompt")
        if not any(token >= first_sentinel for token in prompt):
            return []
        longest = self.config.sequence_length - 1
        if len(prompt) > longest:
            what = f"{len(prompt)} tokens leave no room in a sequence of {self.config.sequence_length}"
            raise ConfigError(Problem("eval.prompt", what, f"shorten it to {longest} tokens"))
        return prompt
