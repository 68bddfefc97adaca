"""The task of ``lm_16l``: a decoder language model on packed text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_scale.config import LMConfig
from moe_scale.data.text import Batch
from moe_scale.errors import Problem
from moe_scale.models.counts import (
    adapter_training_flops_per_token,
    num_active_params,
    num_params,
    training_flops_per_token,
)
from moe_scale.models.decoder import DecoderLM, LMOutput
from moe_scale.models.layers import is_sparse
from moe_scale.models.lora import adapter_problems, add_adapters
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.train.adapters import keep_adapters, trained_line
from moe_scale.train.text import TextTask, inputs_of, summary_of_scores


class LanguageModelTask(TextTask):
    """Train a :class:`DecoderLM` to predict the next token of packed documents."""

    model_kind = "decoder"

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.tokens_per_sequence = config.data.seq_len
        training_flops = adapter_training_flops_per_token if config.lora.enabled else training_flops_per_token
        self.flops_per_token = training_flops(config.model, config.moe, config.data.seq_len)
        self.sparse_layers = [n for n in range(config.model.num_layers) if is_sparse(config.moe, n)]

    def check(self) -> list[Problem]:
        found = super().check()
        if not self.config.lora.enabled or self.config.problems():
            return found
        with torch.device("meta"):
            return found + adapter_problems(self.draw_model(), self.config.lora)

    def draw_model(self, groups: ParallelGroups | None = None) -> DecoderLM:
        return DecoderLM(self.config.model, self.config.moe, groups, self.config.seed)

    def build_model(self, groups: ParallelGroups) -> nn.Module:
        model = super().build_model(groups)
        if self.config.lora.enabled:
            add_adapters(model, self.config.lora, self.config.seed)
        return model

    def forward(self, engine: Any, batch: Batch) -> LMOutput:
        inputs, known = inputs_of(batch)
        return engine(*inputs, **known)

    def evaluate(self, engine: Any) -> dict[str, Any]:
        return self.scored(engine, engine, self.config.eval.sink_sequences).record()

    def summarize(self, engine: Any, scores: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        config = self.config
        total = num_params(config.model, config.moe).total
        active = num_active_params(config.model, config.moe).total
        model, lora = engine.module, config.lora
        if lora.enabled:
            keep_adapters(model, lora, run_dir, base=config.model.pretrained, write=self.rank == 0)
        lines = summary_of_scores(total, active, scores) + trained_line(model, lora, config.moe.ep_size)
        if (sink := scores.get("eval/sink_share")) is not None:
            lines.append(("attention sink", f"{sink:.1%} of attention goes to the first token"))
        if not config.eval.prompt or not config.eval.sample_tokens:
            return lines
        return [*lines, ("sample", self.continued(engine))]
