"""The task of ``classifier``: an encoder on labelled examples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_scale.config import ClassifierConfig
from moe_scale.data.examples.batches import ExampleBatch, ExampleLoader, eval_batches
from moe_scale.data.examples.prepare import ExampleSplit, prepare_examples
from moe_scale.data.examples.sample import encoder_vectors
from moe_scale.data.examples.sources import check_examples
from moe_scale.errors import Problem
from moe_scale.evaluate.baselines import logistic_regression
from moe_scale.evaluate.classification import ClassificationScores, Predictions, predict, score_predictions
from moe_scale.evaluate.classification_plots import draw_calibration, draw_confusion
from moe_scale.models.classifier import Classifier, ClassifierOutput
from moe_scale.models.classifier_counts import num_active_params, num_params, training_flops
from moe_scale.parallel import device
from moe_scale.parallel.groups import ParallelGroups
from moe_scale.train.finished import write_files
from moe_scale.train.task import Task


class ClassifierTask(Task):
    """Train a :class:`Classifier` to name the class of a text or of a sequence of features."""

    def __init__(self, config: ClassifierConfig):
        self.config = config
        self.model_kind = "feature-classifier" if config.data.has_features else "classifier"
        self.tokens_per_sequence = config.data.max_len * config.data.batch_examples
        self.sparse_layers = config.sparse_layers
        self.flops_per_token = self._flops_per_token(config.data.max_len)
        self.scores: dict[str, Literal["lower", "higher"]] = {
            "eval/loss": "lower",
            "eval/accuracy": "higher",
            "eval/f1": "higher",
            "eval/ece": "lower",
        }

    def _flops_per_token(self, lengths: Any) -> float:
        """Training FLOPs over the positions of sequences of these lengths, all together."""
        return float(np.sum(training_flops(self.config.model, self.config.moe, lengths)) / np.sum(lengths))

    def check(self) -> list[Problem]:
        return check_examples(self.config)

    def prepare(self, say: Callable[[str], None]) -> None:
        prepare_examples(self.config, say)

    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        self.batch, self.rank, self.world_size = micro_batch * self.config.data.batch_examples, rank, world_size
        self.examples = prepare_examples(self.config)
        train = self.examples.split("train")
        self.flops_per_token = self._flops_per_token(train.lengths_M)
        self.loader = ExampleLoader(
            train,
            batch=self.batch,
            rank=rank,
            world_size=world_size,
            seed=self.config.seed,
            fingerprint=self.examples.fingerprint,
        )

    @property
    def data_fingerprint(self) -> str:
        return self.examples.fingerprint

    def build_model(self, groups: ParallelGroups) -> Classifier:
        config = self.config
        return Classifier(
            config.model,
            config.moe,
            groups,
            config.seed,
            of_features=config.data.has_features,
            vectors_VI=encoder_vectors() if config.model.embeddings == "encoder" else None,
        )

    def batches(self) -> ExampleLoader:
        return self.loader

    def tokens_in_step(self, budget: int) -> int:
        return self.loader.take_tokens()

    def keep_beside(self, run_dir: Path) -> None:
        vocabulary = self.examples.vocabulary
        if vocabulary is not None:
            vocabulary.save(run_dir / vocabulary.file_name)

    def forward(self, engine: Any, batch: ExampleBatch) -> ClassifierOutput:
        where = device.current()
        return engine(batch.inputs.to(where), batch.valid_BS.to(where), batch.labels_B.to(where))

    def evaluate(self, engine: Any) -> dict[str, Any]:
        found = self._score(engine, self.examples.split("valid"), self.config.eval.max_examples)[1]
        return {
            "eval/loss": found.loss,
            "eval/accuracy": found.accuracy,
            "eval/f1": found.f1,
            "eval/ece": found.ece,
            "eval/examples": found.examples,
        }

    def _score(self, engine: Any, split: ExampleSplit, limit: int = 0) -> tuple[Predictions, ClassificationScores]:
        batches = eval_batches(split, batch=self.batch, rank=self.rank, world_size=self.world_size, limit=limit)
        engine.eval()
        try:
            predictions = predict(engine, batches, device.current())
        finally:
            engine.train()
        return predictions, score_predictions(predictions)

    def summarize(self, engine: Any, scores: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        config, test = self.config, self.examples.split("test")
        predictions, found = self._score(engine, test)
        if self.rank:
            return []
        baseline = logistic_regression(self.examples, config.model.output_size) if config.eval.baseline else None
        chance = self._chance(found)
        not_written = self._write(run_dir, test, predictions, found, {"baseline": baseline, "chance": chance})
        sizes = (count(config.model, config.moe, of_features=config.data.has_features) for count in
                 (num_params, num_active_params))  # fmt: skip
        lines = [
            ("model", "{:,} parameters, {:,} active a position".format(*sizes)),
            ("examples", str(self.examples.report)),
            ("validation", f"loss {scores['eval/loss']:.4f} nats, accuracy {scores['eval/accuracy']:.1%}"),
            ("test accuracy", f"{found.accuracy:.1%} ± {found.standard_error:.1%} of {found.examples:,} held-out "
             f"examples; {_by_chance(found, chance)}"),
        ]  # fmt: skip
        if baseline:
            of = f"accuracy {baseline['accuracy']:.1%}, macro F1 {baseline['f1']:.3f}"
            lines.append(("baseline", f"{baseline['name']}: {of}"))
        lines += [
            ("macro F1", f"{found.f1:.3f}"),
            ("calibration", f"expected calibration error {found.ece:.3f}, {len(found.reliability)} bins"),
        ]
        if config.model.output_size <= 10:
            lines.append(("confusion", _table(found.confusion)))
        return [*lines, *not_written]

    def _chance(self, found: ClassificationScores) -> dict[str, float]:
        """Accuracies without a look at the examples: always the most frequent class of training, and even guessing with
        its standard error."""
        train, test = self.examples.split("train"), self.examples.split("test")
        most_frequent = np.bincount(train.labels_M).argmax()
        accuracy = float(np.mean(test.labels_M == most_frequent))
        even = 1 / self.config.model.output_size
        return {"accuracy": accuracy, "even": even, "standard_error": math.sqrt(even * (1 - even) / found.examples)}

    def _write(
        self, run_dir: Path, test: ExampleSplit, predictions: Predictions, found: ClassificationScores, beside: dict
    ) -> list[tuple[str, str]]:
        """``test_scores.json``, ``predictions.jsonl`` with every test example, and the pictures.

        Returns:
            a line for the summary where that failed.
        """
        record = {"model": found.record(), **beside}
        rows = zip(
            predictions.places_N.tolist(),
            predictions.labels_N.tolist(),
            predictions.predicted.tolist(),
            predictions.probs_NC.tolist(),
            strict=True,
        )
        lines = []
        for place, label, predicted, probs in rows:
            line = {"example": place, "label": label, "predicted": predicted, "probabilities": probs}
            if self.examples.vocabulary is not None:
                line["text"] = test.text(place)
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        return write_files(
            run_dir,
            {
                "test_scores.json": json.dumps(record, indent=2).encode() + b"\n",
                "predictions.jsonl": "".join(lines).encode(),
                "confusion.png": lambda path: draw_confusion(found, path),
                "calibration.png": lambda path: draw_calibration(found, path),
            },
        )


def _by_chance(found: ClassificationScores, chance: dict[str, float]) -> str:
    """How far the accuracy is from guessing."""
    errors = abs(found.accuracy - chance["even"]) / chance["standard_error"]
    return (
        f"guessing gives {chance['even']:.1%}, {errors:.1f} standard errors from that, and the most frequent class "
        f"{chance['accuracy']:.1%}"
    )


def _table(confusion: list[list[int]]) -> str:
    """The confusion matrix as text: a row a class, a column a prediction."""
    width = max(5, *(len(f"{count:,}") for row in confusion for count in row)) + 1
    head = "class " + "".join(f"{f'as {n}':>{width}}" for n in range(len(confusion)))
    rows = [f"{n:<6}" + "".join(f"{count:>{width},}" for count in row) for n, row in enumerate(confusion)]
    return "\n".join([head, *rows])
