"""The task of ``translation``: an encoder-decoder on sentence pairs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_scale.config import TranslationConfig
from moe_scale.data.pairs.batches import PairBatch, PairLoader, eval_pair_batches, pair_loader, token_budget
from moe_scale.data.pairs.order import SOURCE_EXTRA, TARGET_EXTRA
from moe_scale.data.pairs.prepare import TOKENIZER, PairSplit, prepare_pairs
from moe_scale.data.pairs.sources import check_pair_source
from moe_scale.errors import Problem
from moe_scale.evaluate.text_metrics import MAX_COMPARED, TextScores, nearest_translations, signatures
from moe_scale.evaluate.translation import (
    OVERALL,
    Search,
    score_pairs,
    scores_by_direction,
    translate_batches,
)
from moe_scale.models.seq2seq import PAD_ID, Seq2Seq, Seq2SeqOutput
from moe_scale.models.seq2seq_counts import num_active_params, num_params, training_flops
from moe_scale.parallel import device
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.train.finished import write_files
from moe_scale.train.task import Task, unequal_batches


class TranslationTask(Task):
    """Train a :class:`Seq2Seq` to translate."""

    model_kind = "seq2seq"

    def __init__(self, config: TranslationConfig):
        self.config = config
        self.tokens_per_sequence = config.data.batch_tokens
        self.sparse_layers = config.sparse_layers
        self.flops_per_token = self._flops_per_token(config.data.max_len, config.data.max_len)
        self.scores: dict[str, Literal["lower", "higher"]] = {"eval/loss": "lower", "eval/perplexity": "lower"}
        if config.eval.bleu_sentences:
            self.scores |= {"eval/bleu": "higher", "eval/chrf": "higher"}

    def check(self) -> list[Problem]:
        return check_pair_source(self.config.data) + unequal_batches(self.config.moe)

    def prepare(self, say: Callable[[str], None]) -> None:
        prepare_pairs(self.config.data, self.config.model.vocab_size, say)

    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        config = self.config
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        self.pairs = prepare_pairs(config.data, config.model.vocab_size)
        self.tokenizer = self.pairs.tokenizer
        assert self.tokenizer.pad_id == PAD_ID
        train = self.pairs.split("train")
        self.flops_per_token = self._flops_per_token(
            train.source_lengths_M + SOURCE_EXTRA, train.target_lengths_M + TARGET_EXTRA
        )
        self.loader = pair_loader(
            self.pairs, config.data, micro_batch=micro_batch, rank=rank, world_size=world_size, seed=config.seed
        )

    def _flops_per_token(self, source_len: Any, target_len: Any) -> float:
        """Training FLOPs over the tokens of pairs of these lengths, all pairs together."""
        flops = training_flops(self.config.model, self.config.moe, source_len, target_len)
        return float(np.sum(flops) / np.sum(source_len + target_len))

    @property
    def data_fingerprint(self) -> str:
        return self.pairs.fingerprint

    def build_model(self, groups: ParallelGroups) -> Seq2Seq:
        return Seq2Seq(self.config.model, self.config.moe, groups, self.config.seed)

    def batches(self) -> PairLoader:
        return self.loader

    def tokens_in_step(self, budget: int) -> int:
        return self.loader.take_tokens()

    def keep_beside(self, run_dir: Path) -> None:
        self.tokenizer.save(run_dir / TOKENIZER)

    def forward(self, engine: Any, batch: PairBatch) -> Seq2SeqOutput:
        where = device.current()
        return engine(batch.source_BS.to(where), batch.inputs_BT.to(where), batch.targets_BT.to(where))

    def evaluate(self, engine: Any) -> dict[str, Any]:
        valid, limit = self.pairs.split("valid"), self.config.eval.bleu_sentences
        engine.eval()
        try:
            scored = score_pairs(engine, self._heldout(valid, 0), device.current())
            record: dict[str, Any] = {
                "eval/loss": scored.loss,
                "eval/perplexity": scored.perplexity,
                "eval/targets": scored.targets,
            }
            if limit:
                for direction, found in self._translate(engine, valid, limit, beam_size=1)[1].items():
                    place = "" if direction == OVERALL else f"/{direction}"
                    record |= {f"eval/bleu{place}": found.bleu, f"eval/chrf{place}": found.chrf}
        finally:
            engine.train()
        return record

    def _heldout(self, split: PairSplit, limit: int) -> Iterator[PairBatch]:
        """This rank's batches of the first ``limit`` pairs of each direction; 0 means all."""
        for batch in eval_pair_batches(
            split,
            self.tokenizer,
            limit_per_direction=limit,
            budget=token_budget(self.config.data, self.micro_batch),
            rank=self.rank,
            world_size=self.world_size,
        ):
            self.progressed()
            yield batch

    def _translate(
        self, engine: Any, split: PairSplit, limit: int, *, beam_size: int
    ) -> tuple[dict[int, str], dict[str, TextScores]]:
        """Translations by number, and their scores by direction."""
        search = Search(beam_size, self.config.eval.length_penalty, self.config.max_target_len)
        found = translate_batches(engine, self._heldout(split, limit), self.tokenizer, search, device.current())
        pairs = {number: split.text(number) for number in found}
        return found, scores_by_direction(
            found,
            {number: pair.target for number, pair in pairs.items()},
            {number: pair.direction for number, pair in pairs.items()},
        )

    def summarize(self, engine: Any, scores: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        config, test = self.config, self.pairs.split("test")
        limit = config.eval.test_sentences
        engine.eval()
        try:
            by_greedy, greedy_scores = self._translate(engine, test, limit, beam_size=1)
            by_beam, beam_scores = self._translate(engine, test, limit, beam_size=config.eval.beam_size)
        finally:
            engine.train()
        if self.rank:
            return []
        copied, nearest = self._baselines(test, sorted(by_greedy))
        found = {"greedy": greedy_scores, "beam": beam_scores, "copy": copied, "nearest": nearest}
        not_written = self._write(run_dir, test, by_greedy, by_beam, found)
        others_are = "copies of the source" + (
            " and the translation of the nearest training sentence"
            if nearest
            else "; that of the nearest training sentence was not looked for, as there are too many to compare"
        )
        lines = [
            (
                "model",
                f"{num_params(config.model, config.moe):,} parameters, {num_active_params(config.model, config.moe):,} "
                "active a token",
            ),
            ("held-out loss", f"{scores['eval/loss']:.4f} nats a token, perplexity {scores['eval/perplexity']:.2f}"),
            (
                "test BLEU",
                f"{signatures()['bleu']}; beam {config.eval.beam_size}, greedy, and for comparison {others_are}",
            ),
        ]
        columns = {"beam": beam_scores, "greedy": greedy_scores, "copied": copied}
        columns |= {"nearest": nearest} if nearest else {}
        lines.append(("", " | ".join(f"{name:>7}" for name in columns) + " | chrF of beam"))
        for direction, best in beam_scores.items():
            bleu = " | ".join(f"{scores[direction].bleu:7.1f}" for scores in columns.values())
            lines.append((f"  {direction}", f"{bleu} | {best.chrf:.1f}, {best.sentences:,} sentences"))
        return [*lines, *self._examples(test, by_beam), *not_written]

    def _baselines(
        self, test: PairSplit, numbers: list[int]
    ) -> tuple[dict[str, TextScores], dict[str, TextScores] | None]:
        """Scores of copying the source, and of the nearest training sentence's translation; None where that takes
        too long."""
        train = self.pairs.split("train")
        known: dict[str, list[int]] = {direction: [] for direction in self.pairs.directions}
        for number, direction in enumerate(train.direction_M.tolist()):
            known[self.pairs.directions[direction]].append(number)
        pairs = {number: test.text(number) for number in numbers}
        directions = {number: pair.direction for number, pair in pairs.items()}
        references = {number: pair.target for number, pair in pairs.items()}
        copied = scores_by_direction({n: pair.source for n, pair in pairs.items()}, references, directions)
        if sum(len(known[direction]) for direction in directions.values()) > MAX_COMPARED:
            return copied, None
        nearest: dict[int, str] = {}
        for direction in sorted(set(directions.values())):
            some = [number for number in numbers if directions[number] == direction]
            texts = [train.text(number) for number in known[direction]]
            found = nearest_translations(
                [pairs[number].source for number in some],
                [pair.source for pair in texts],
                [pair.target for pair in texts],
            )
            nearest |= dict(zip(some, found, strict=True))
        return copied, scores_by_direction(nearest, references, directions)

    def _write(
        self,
        run_dir: Path,
        test: PairSplit,
        by_greedy: dict[int, str],
        by_beam: dict[int, str],
        found: dict[str, dict[str, TextScores] | None],
    ) -> list[tuple[str, str]]:
        """Write ``test_scores.json``, and ``test_translations.jsonl`` with every test sentence.

        Returns:
            a line for the summary where that failed.
        """
        record = {
            "signatures": signatures(),
            "beam_size": self.config.eval.beam_size,
            "length_penalty": self.config.eval.length_penalty,
            "scores": {
                name: {direction: vars(score) for direction, score in scores.items()}
                for name, scores in found.items()
                if scores is not None
            },
        }
        lines = []
        for number in sorted(by_beam):
            texts = {**test.text(number)._asdict(), "beam": by_beam[number], "greedy": by_greedy[number]}
            lines.append(json.dumps(texts, ensure_ascii=False) + "\n")
        return write_files(
            run_dir,
            {
                "test_scores.json": json.dumps(record, indent=2).encode() + b"\n",
                "test_translations.jsonl": "".join(lines).encode(),
            },
        )

    def _examples(self, test: PairSplit, translations: dict[int, str]) -> list[tuple[str, str]]:
        """One translation a direction, of up to three: the sentence of middle length."""
        lines = []
        for direction in self.pairs.directions[:3]:
            some = [n for n in translations if test.text(n).direction == direction]
            if some:
                number = sorted(some, key=lambda n: (len(test.text(n).source), n))[len(some) // 2]
                lines.append((f"example {direction}", f"{test.text(number).source}\n{translations[number]}"))
        return lines
