"""The task of ``multimodal``: encoders of texts and images on retrieval, classes or scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_scale.config import MultimodalConfig
from moe_scale.data.images.batches import ImageTextBatch, eval_batches, eval_items, eval_languages
from moe_scale.data.images.loader import ImageTextLoader, train_loader
from moe_scale.data.images.prepare import PreparedImageText, prepare_image_text
from moe_scale.data.images.sources import check_image_text
from moe_scale.data.images.split_files import ImageTextSplit
from moe_scale.errors import Problem
from moe_scale.evaluate.glue import METRICS, glue_scores, vqa_accuracy
from moe_scale.evaluate.retrieval import RetrievalScores
from moe_scale.evaluate.text_image import answer, score_retrieval
from moe_scale.models.multimodal_counts import num_active_params, num_params, training_flops
from moe_scale.models.text_image import MultimodalOutput, TextImageModel
from moe_scale.parallel import device
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.train.adapters import trained_line
from moe_scale.train.finished import write_files
from moe_scale.train.multimodal_model import (
    KIND,
    build_text_image,
    keep_all_adapters,
    model_problems,
    model_remarks,
    vocabulary_of,
)
from moe_scale.train.task import Task, unequal_batches

TO_TEXT, TO_IMAGE = "image_to_text_r1", "text_to_image_r1"
"""Recall at 1 of images that look for their texts, and the other way round."""


class MultimodalTask(Task):
    """Train a :class:`TextImageModel`. A token is one of a text, or a position of an image."""

    model_kind = KIND

    def __init__(self, config: MultimodalConfig):
        self.config = config
        model, data = config.model, config.data
        self.image_positions = 1 + model.image.num_patches if model.has_images else 0
        self.tokens_per_sequence = data.batch_examples * (data.max_len + self.image_positions)
        self.sparse_layers = config.sparse_layers
        self.flops_per_token = self._flops_per_token(np.array([data.max_len]))
        better: dict[str, Literal["lower", "higher"]] = {"eval/loss": "lower"}
        self.scores = better | {f"eval/{name}": "higher" for name in self._metrics}

    @property
    def _metrics(self) -> tuple[str, ...]:
        """Names of the held-out scores besides the loss."""
        if self.config.model.goal == "retrieval":
            return (TO_TEXT, TO_IMAGE)
        if self.config.data.is_glue:
            return (*METRICS.get(self._glue_task, ()), "score")
        return ("accuracy",)

    @property
    def _glue_task(self) -> str:
        return self.config.data.source.removeprefix("glue/")

    def _flops_per_token(self, lengths: np.ndarray) -> float:
        """Training FLOPs over the tokens of texts of these lengths with their images, all together."""
        flops = training_flops(self.config.model, self.config.moe, lengths)
        return float(np.sum(flops) / np.sum(lengths + self.image_positions))

    def check(self) -> list[Problem]:
        found = check_image_text(self.config.data) + unequal_batches(self.config.moe)
        # A model of settings that do not fit each other cannot be built to look at.
        return found + ([] if self.config.problems() else model_problems(self.config))

    def remarks(self) -> list[str]:
        return model_remarks(self.config)

    def prepare(self, say: Callable[[str], None]) -> None:
        self._prepared(say)

    def _prepared(self, say: Callable[[str], None] | None = None) -> PreparedImageText:
        """The data, in the words of the run that the model begins with, if it begins with one."""
        model, vocabulary = self.config.model, None
        if model.pretrained:
            vocabulary = vocabulary_of(model.pretrained)
        return prepare_image_text(self.config.data, model.vocab_size, say, vocabulary=vocabulary)

    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        config = self.config
        self.batch, self.rank, self.world_size = micro_batch * config.data.batch_examples, rank, world_size
        self.data = self._prepared()
        self.flops_per_token = self._flops_per_token(self.data.split("train").lengths_T)
        self.loader = train_loader(
            self.data, config.data, micro_batch=micro_batch, rank=rank, world_size=world_size, seed=config.seed
        )

    @property
    def data_fingerprint(self) -> str:
        return self.data.fingerprint

    def build_model(self, groups: ParallelGroups) -> TextImageModel:
        return build_text_image(self.config, groups)

    def batches(self) -> ImageTextLoader:
        return self.loader

    def tokens_in_step(self, budget: int) -> int:
        rows = budget // self.tokens_per_sequence * self.config.data.batch_examples
        return self.loader.take_tokens() + rows * self.image_positions

    def keep_beside(self, run_dir: Path) -> None:
        self.data.vocabulary.save(run_dir / self.data.vocabulary.file_name)

    def forward(self, engine: Any, batch: ImageTextBatch) -> MultimodalOutput:
        return engine(*batch.to(device.current()))

    def evaluate(self, engine: Any) -> dict[str, Any]:
        engine.eval()
        try:
            if self.config.model.goal == "retrieval":
                return self._evaluate_retrieval(engine)
            loss, found, _ = self._score_answers(engine, self.data.split("valid"), self.config.eval.max_items)
            return {"eval/loss": loss} | {f"eval/{name}": value for name, value in found.items()}
        finally:
            engine.train()

    def _evaluate_retrieval(self, engine: Any) -> dict[str, Any]:
        """Over the languages that were trained: means, and of each recall at 1."""
        split, record = self.data.split("valid"), {}
        found = self._score_languages(engine, split, self.config.eval.max_items)
        trained = [code for code, is_trained in eval_languages(self.data, split).items() if is_trained]
        record["eval/loss"] = float(np.mean([found[code][0] for code in trained]))
        for name in (TO_TEXT, TO_IMAGE):
            of = {code: _recall_at_1(found[code][1], name) for code in found}
            record[f"eval/{name}"] = float(np.mean([of[code] for code in trained]))
            record |= {f"eval/{name}/{code}": value for code, value in of.items()}
        return record

    def _score_languages(
        self, engine: Any, split: ImageTextSplit, limit: int
    ) -> dict[str, tuple[float, RetrievalScores]]:
        """(loss, recall) in each language of a split."""
        found = {}
        for language in eval_languages(self.data, split):
            batches = eval_items(
                self.data,
                split,
                self.config.data,
                language=language,
                batch=self.batch,
                rank=self.rank,
                world_size=self.world_size,
                limit=limit,
            )
            found[language] = score_retrieval(engine, self._watched(batches), device.current())
        return found

    def _score_answers(self, engine: Any, split: ImageTextSplit, limit: int = 0) -> tuple[float, dict[str, float], int]:
        """The loss, the scores of GLUE or VQA, and the number of examples, of a split for classes or scores."""
        batches = eval_batches(
            self.data,
            split,
            self.config.data,
            batch=self.batch,
            rank=self.rank,
            world_size=self.world_size,
            limit=limit,
        )
        loss, places_N, labels_N, outputs_NO = answer(engine, self._watched(batches), device.current())
        regression = self.config.model.goal == "regression"
        predicted_N = outputs_NO[:, 0] if regression else outputs_NO.argmax(axis=1)
        if self.config.data.is_glue:
            return loss, glue_scores(self._glue_task, predicted_N, labels_N), len(places_N)
        said = [self.data.answers[number] for number in predicted_N.tolist()]
        right = vqa_accuracy(said, [split.answers(place) for place in places_N.tolist()])
        return loss, {"accuracy": right}, len(places_N)

    def _watched(self, batches: Any) -> Any:
        for batch in batches:
            self.progressed()
            yield batch

    def summarize(self, engine: Any, scores: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        config = self.config
        if config.lora.enabled:
            keep_all_adapters(engine.module, config, run_dir, write=self.rank == 0)
        engine.eval()
        lines = [
            ("model", "{:,} parameters, {:,} active".format(
                *(count(config.model, config.moe).total for count in (num_params, num_active_params)))),
            *trained_line(engine.module, config.lora, config.moe.ep_size),
            ("data", str(self.data.report)),
        ]  # fmt: skip
        if config.model.goal == "retrieval":
            record, found = self._test_retrieval(engine)
        else:
            record, found = self._test_answers(engine)
        if self.rank == 0:
            found += write_files(run_dir, {"test_scores.json": json.dumps(record, indent=2).encode() + b"\n"})
        if self.loader.report.skipped:
            found.append(("skipped", f"images in training: {self.loader.report.skips()}"))
        return [*lines, ("validation", f"loss {scores['eval/loss']:.4f}"), *found]

    def _test_retrieval(self, engine: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        split = self.data.split("test")
        found, trained = self._score_languages(engine, split, 0), eval_languages(self.data, split)
        lines = []
        for code, (_, both) in found.items():
            text = "; ".join(
                f"{way} recall@1/5/10 {' / '.join(f'{value:.1%}' for value in one.recall.values())}, median rank "
                f"{one.median_rank:g} of {one.candidates:,}, recall@1 {one.over_chance:.1f} times chance"
                for way, one in (("image to text", both.image_to_text), ("text to image", both.text_to_image))
            )
            lines.append((f"test {code}", text if trained[code] else f"{text} (not trained on)"))
        record = {
            code: {"trained": trained[code], "loss": loss} | both.record() for code, (loss, both) in found.items()
        }
        return {"test": record}, lines

    def _test_answers(self, engine: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        record, lines = {}, []
        for name in ("test", "mismatched"):
            split = self.data.split(name)
            if not len(split):
                continue
            loss, found, examples = self._score_answers(engine, split)
            record[name] = {"examples": examples, "loss": loss} | found
            shown = ", ".join(f"{metric} {value:.4f}" for metric, value in found.items())
            lines.append((name, f"{shown}; loss {loss:.4f}, {examples:,} held-out examples"))
        return record, lines


def _recall_at_1(scores: RetrievalScores, name: str) -> float:
    return (scores.image_to_text if name == TO_TEXT else scores.text_to_image).recall[1]
