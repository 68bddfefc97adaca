"""The task of ``lm_16l``: a decoder language model on packed text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from moe_scale.config import LMConfig
from moe_scale.data.sources import check_source
from moe_scale.data.text import Batch, StreamedText, TrainLoader, eval_batches, open_text, train_loader
from moe_scale.data.tokenizer import load_tokenizer
from moe_scale.errors import ConfigError, Problem
from moe_scale.evaluate.language_model import score
from moe_scale.generate.full_passes import sample_text
from moe_scale.models.counts import num_active_params, num_params, training_flops_per_token
from moe_scale.models.decoder import DecoderLM, LMOutput
from moe_scale.models.layers import is_sparse
from moe_scale.parallel import device
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.train.task import Task


class LanguageModelTask(Task):
    """Train a :class:`DecoderLM` to predict the next token of packed documents."""

    model_kind = "decoder"

    def __init__(self, config: LMConfig):
        self.scores: dict[str, Literal["lower", "higher"]] = {
            "eval/loss": "lower",
            "eval/perplexity": "lower",
            "eval/bits_per_byte": "lower",
        }
        self.config = config
        self.tokens_per_sequence = config.data.seq_len
        self.flops_per_token = training_flops_per_token(config.model, config.moe, config.data.seq_len)
        self.sparse_layers = [n for n in range(config.model.num_layers) if is_sparse(config.moe, n)]

    def check(self) -> list[Problem]:
        found = check_source(self.config.data)
        try:
            tokenizer = load_tokenizer(self.config.data.tokenizer)
        except ConfigError as error:
            return found + error.problems
        if tokenizer.vocab_size > self.config.model.vocab_size:
            found.append(
                Problem(
                    "model.vocab_size",
                    f"{self.config.model.vocab_size} < {tokenizer.vocab_size} tokens of "
                    f"data.tokenizer = {self.config.data.tokenizer}",
                    f"choose at least {tokenizer.vocab_size}",
                )
            )
        return found

    def prepare(self, say: Callable[[str], None]) -> None:
        text = open_text(self.config.data, load_tokenizer(self.config.data.tokenizer), say)
        if isinstance(text, StreamedText):
            text.heldout(self.config.eval.max_tokens, say)  # stored now, not while all ranks wait at an evaluation

    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch
        self.tokenizer = load_tokenizer(self.config.data.tokenizer)
        self.token_bytes_V = self.tokenizer.token_bytes()
        self.text = open_text(self.config.data, self.tokenizer)
        self.loader = train_loader(
            self.text,
            self.config.data,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            seed=self.config.seed,
        )

    @property
    def data_fingerprint(self) -> str:
        return self.text.fingerprint

    def build_model(self, groups: ParallelGroups) -> DecoderLM:
        return DecoderLM(self.config.model, self.config.moe, groups, self.config.seed)

    def batches(self) -> TrainLoader:
        return self.loader

    def forward(self, engine: Any, batch: Batch) -> LMOutput:
        where = device.current()
        # Sequences that lie inside one document need no mask, and attention without one is faster. Decided here,
        # where the ids are still on the host.
        one_document = bool((batch.document_ids_BS == 0).all())
        documents = None if one_document else batch.document_ids_BS.to(where)
        padded = bool((batch.document_ids_BS < 0).any())
        return engine(batch.ids_BS.to(where), batch.targets_BS.to(where), documents, padded=padded)

    def evaluate(self, engine: Any) -> dict[str, Any]:
        config = self.config
        batches = eval_batches(
            self.text,
            config.data,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            max_tokens=config.eval.max_tokens,
        )
        engine.eval()
        try:
            scores = score(
                engine,
                batches,
                token_bytes_V=self.token_bytes_V,
                vocab_size=config.model.vocab_size,
                sink_sequences=config.eval.sink_sequences,
                device=device.current(),
            )
        finally:
            engine.train()
        return scores.record()

    def summarize(self, engine: Any, scores: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        config = self.config
        total = num_params(config.model, config.moe).total
        active = num_active_params(config.model, config.moe).total
        gap = scores["eval/unigram_entropy"] - scores["eval/loss"]
        distance = f"{abs(gap):.2f} {'below' if gap >= 0 else 'above'} it"
        sink = scores.get("eval/sink_share")
        lines = [
            ("model", f"{total:,} parameters, {active:,} active a token"),
            ("held-out loss", f"{scores['eval/loss']:.4f} nats a token over {scores['eval/tokens']:,} tokens"),
            ("perplexity", f"{scores['eval/perplexity']:.2f}"),
            ("bits per byte", f"{scores['eval/bits_per_byte']:.4f}"),
            (
                "unigram entropy",
                f"{scores['eval/unigram_entropy']:.4f} nats of the same text; the loss is {distance}",
            ),
            *([("attention sink", f"{sink:.1%} of attention goes to the first token")] if sink is not None else []),
        ]
        text = self._continue_prompt(engine)
        return [*lines, *([("sample", text)] if text else [])]

    def _continue_prompt(self, engine: Any) -> str:
        config = self.config
        if not config.eval.prompt or not config.eval.sample_tokens:
            return ""
        prompt = [self.tokenizer.eot_id, *self.tokenizer.encode(config.eval.prompt)]
        engine.eval()
        text = sample_text(
            partial(engine, last_only=True),
            self.tokenizer,
            prompt,
            num_tokens=config.eval.sample_tokens,
            window=config.data.seq_len,
            seed=config.seed,
            device=device.current(),
        )
        engine.train()
        return config.eval.prompt + text
