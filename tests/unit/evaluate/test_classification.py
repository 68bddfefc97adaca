"""Scores of predictions, by hand; the pictures; and what the baselines can and cannot tell."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_scale.config import ClassifierConfig, ClassifierModelConfig, ExampleDataConfig
from moe_scale.data.examples.prepare import prepare_examples
from moe_scale.evaluate.baselines import MEAN_FEATURES, TFIDF, logistic_regression
from moe_scale.evaluate.classification import Predictions, macro_f1, predict, reliability, score_predictions
from moe_scale.evaluate.classification_plots import draw_calibration, draw_confusion


def predictions(labels: list[int], probs: list[list[float]]) -> Predictions:
    return Predictions(np.arange(len(labels)), np.array(labels), np.array(probs))


HAND = predictions(
    [0, 0, 1, 1, 2],
    [[0.8, 0.1, 0.1], [0.3, 0.61, 0.09], [0.1, 0.65, 0.25], [0.1, 0.9, 0.0], [0.4, 0.35, 0.25]],
)


def test_by_hand() -> None:
    found = score_predictions(HAND)
    assert found.examples == 5
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert found.loss == pytest.approx(-np.log([0.8, 0.3, 0.65, 0.9, 0.25]).mean())
    assert found.confusion == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    # class 0: precision 1/2, recall 1/2; class 1: 2/3 and 1; class 2 is never predicted
    assert found.f1 == pytest.approx((0.5 + 0.8 + 0.0) / 3)
    # Bins of a fifteenth: 0.61 and 0.65 share one, the others are alone.
    assert found.ece == pytest.approx((abs(1 - 0.8) + abs(1 - 1.26) + abs(1 - 0.9) + abs(0 - 0.4)) / 5)


def test_bins_hold_every_example_once() -> None:
    draw = np.random.RandomState(0)
    probs = draw.dirichlet([1.0, 1.0], size=500)
    probs[:4] = [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [8 / 15, 7 / 15]]  # ends and an edge
    given = predictions(draw.randint(2, size=500).tolist(), probs.tolist())
    bins = reliability(given)
    assert len(bins) == 15
    assert sum(b.examples for b in bins) == 500
    confidence = probs.max(axis=1)
    right = given.predicted == given.labels_N
    for b in bins:
        inside = (confidence > b.low + 1e-9) & (confidence < b.high - 1e-9)
        if inside.sum() != b.examples:
            continue  # one is on the edge
        if b.examples:
            assert b.low <= b.confidence <= b.high
            assert b.accuracy == pytest.approx(right[inside].mean())
        else:
            assert math.isnan(b.confidence)


def test_a_sure_model_and_a_sure_error() -> None:
    right = score_predictions(predictions([0, 1], [[1.0, 0.0], [0.0, 1.0]]))
    assert (right.accuracy, right.ece, right.loss, right.standard_error) == (1, 0, 0, 0)
    wrong = score_predictions(predictions([1, 1], [[1.0, 0.0], [1.0, 0.0]]))
    assert (wrong.accuracy, wrong.ece) == (0, 1)
    assert math.isfinite(wrong.loss)


def test_the_record_has_no_nan() -> None:
    import json

    text = json.dumps(score_predictions(HAND).record(), allow_nan=False)
    assert json.loads(text)["reliability"][0]["accuracy"] is None


def test_classes_that_do_not_occur_count_nothing() -> None:
    assert macro_f1(np.array([0, 1]), np.array([0, 1]), 4) == pytest.approx(0.5)


def test_pictures(tmp_path: Path) -> None:
    scores = score_predictions(HAND)
    draw_confusion(scores, tmp_path / "confusion.png")
    draw_calibration(scores, tmp_path / "calibration.png")
    many = score_predictions(predictions(list(range(30)), np.eye(30).tolist()))
    draw_confusion(many, tmp_path / "many.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("confusion", "calibration", "many"))


def synthetic(tmp_path: Path) -> ClassifierConfig:
    data = ExampleDataConfig(source="synthetic", synthetic_examples=1500, max_len=8, cache_dir=str(tmp_path))
    return ClassifierConfig(model=ClassifierModelConfig(input_size=16, output_size=2), data=data)


def test_the_mean_of_features_does_not_tell_their_order(tmp_path: Path) -> None:
    config = synthetic(tmp_path)
    found = logistic_regression(prepare_examples(config), 2)
    assert found["name"] == MEAN_FEATURES
    assert found["accuracy"] == pytest.approx(0.5, abs=3 * 0.5 / 150**0.5), "three standard errors of a guess"


def test_words_tell_what_words_can(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"number {n} is {('even', 'odd')[n % 2]},{n % 2}\n" for n in range(100))
    )
    signs = [f"{'ab'[n % 2]} {' '.join(str(n))}" for n in range(100)]
    (tmp_path / "b.csv").write_text("text,label\n" + "".join(f"{t},{n % 2}\n" for n, t in enumerate(signs)))
    for name in ("a.csv", "b.csv"):  # the second has no word of two letters
        data = ExampleDataConfig(source=str(tmp_path / name), tokenizer="encoder", cache_dir=str(tmp_path / "cache"))
        config = ClassifierConfig(model=ClassifierModelConfig(vocab_size=30_522), data=data)
        found = logistic_regression(prepare_examples(config), 2)
        assert (found["name"], found["accuracy"], found["f1"]) == (TFIDF, 1.0, 1.0)


def test_predictions_come_in_the_order_of_the_split(tmp_path: Path) -> None:
    from moe_scale.data.examples.batches import eval_batches
    from moe_scale.models.classifier import Classifier

    config = synthetic(tmp_path)
    split = prepare_examples(config).split("test")
    model = Classifier(config.model, config.moe, of_features=True).eval()
    found = predict(model, eval_batches(split, batch=16, rank=0, world_size=1), torch.device("cpu"))
    assert found.places_N.tolist() == list(range(len(split)))
    assert found.labels_N.tolist() == split.labels_M.tolist()
    np.testing.assert_allclose(found.probs_NC.sum(axis=1), 1)
    alone = next(iter(eval_batches(split, batch=1, rank=0, world_size=1)))
    expected = model(*alone[:3]).logits_BC.softmax(dim=-1)[0].tolist()
    np.testing.assert_allclose(found.probs_NC[int(alone.indices_B[0])], expected, rtol=1e-4)
