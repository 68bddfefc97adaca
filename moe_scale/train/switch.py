"""The task of ``switch``: a Switch Transformer on text, which it continues, or fills in where spans were cut out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_scale.config import SwitchConfig
from moe_scale.data.sentinels import encode_with_sentinels, with_sentinels
from moe_scale.data.span_corruption import CorruptedLoader, SpanCorruption, restore
from moe_scale.data.text import Batch
from moe_scale.models.decoder import LMOutput
from moe_scale.models.layers import is_sparse
from moe_scale.models.switch import SwitchLM
from moe_scale.models.switch_counts import num_active_params, num_params, training_flops_per_token
from moe_scale.parallel import device
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.train.text import TextTask, last_logits, summary_of_scores

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

    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        super().open(micro_batch=micro_batch, rank=rank, world_size=world_size)
        if self.config.model.is_causal:
            return
        first = self.tokenizer.vocab_size
        self.tokenizer = with_sentinels(self.tokenizer, self.config.model.num_sentinels)
        self.first_sentinel = first
        corruption = SpanCorruption(self.config, first, self.config.seed)
        self.loader = CorruptedLoader(self.loader, corruption, micro_batch=micro_batch, rank=rank)

    def build_model(self, groups: ParallelGroups) -> SwitchLM:
        return SwitchLM(self.config.model, self.config.moe, groups, self.config.seed)

    def forward(self, engine: Any, batch: Batch) -> LMOutput:
        where = device.current()
        # Sequences that lie inside one document need no mask of their own, and attention without one is faster.
        # Decided here, where the ids are still on the host.
        one_document = bool((batch.document_ids_BS == 0).all())
        documents = None if one_document else batch.document_ids_BS.to(where)
        padded = bool((batch.document_ids_BS < 0).any())
        return engine(batch.ids_BS.to(where), batch.targets_BS.to(where), documents, padded=padded, prefix=self.prefix)

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
        if not config.eval.prompt or not config.eval.sample_tokens:
            return lines
        return [*lines, ("sample", self._continued(engine) if config.model.is_causal else self._filled_in(engine))]

    def _continued(self, engine: Any) -> str:
        text = self.config.eval.prompt
        prompt = [self.tokenizer.eot_id, *self.tokenizer.encode(text)]
        return text + self.sampled(engine, last_logits(engine), prompt)

    def _filled_in(self, engine: Any) -> str:
        """The prompt with what the model wrote in place of its sentinels."""
        prompt = encode_with_sentinels(self.tokenizer, self.config.eval.prompt, self.first_sentinel)
        written = self.sampled(engine, functools.partial(engine, prefix=len(prompt), last_only=True), prompt)
        target = encode_with_sentinels(self.tokenizer, written, self.first_sentinel)
        return self.tokenizer.decode(restore(prompt, target, self.first_sentinel))
