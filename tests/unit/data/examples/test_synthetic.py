"""Sequences whose class is a matter of order, and the control."""

from __future__ import annotations

import numpy as np
import pytest

from moe_scale.data.examples.example import Example
from moe_scale.data.examples.synthetic import synthetic_examples
from tests.unit.data.examples.conftest import Settings


def make(settings: Settings, *, classes: int = 4, random_labels: bool = False, seed: int = 0) -> list[Example]:
    config = settings(source="synthetic", synthetic_examples=600, max_len=12, synthetic_seed=seed).data
    return list(synthetic_examples(config, input_size=40, num_classes=classes, random_labels=random_labels))


def prototypes(seed: int, classes: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((classes, 40))


@pytest.mark.parametrize("classes", [2, 4])
def test_the_label_is_the_prototype_that_occurs_first(settings: Settings, classes: int) -> None:
    of_classes = prototypes(0, classes)
    right = 0
    for example in make(settings, classes=classes):
        assert example.features_SI is not None
        assert 6 <= len(example.features_SI) <= 12
        # From noise around a prototype it is 0.25 on average, from noise alone 1.25, from another prototype 2.25.
        distances_SC = ((example.features_SI[:, None] - of_classes) ** 2).mean(axis=2)
        marks = np.argwhere(distances_SC < 0.5)  # positions, in their order, with the class that is there
        right += marks[0, 1] == example.label
        assert len(set(marks[:, 1])) == min(classes, 3)
    assert right >= 590, "noise may look like a prototype now and then"


def test_all_classes_come_evenly(settings: Settings) -> None:
    for random_labels in (False, True):
        counts = np.bincount([e.label for e in make(settings, random_labels=random_labels)])
        assert counts.min() > 150 - 4 * 11, "four standard deviations of a share of a quarter"


def test_the_control_has_the_same_sequences_and_other_labels(settings: Settings) -> None:
    learnable, control = make(settings), make(settings, random_labels=True)
    assert all(np.array_equal(a.features_SI, b.features_SI) for a, b in zip(learnable, control, strict=True))
    agree = np.mean([a.label == b.label for a, b in zip(learnable, control, strict=True)])
    assert agree == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 600) ** 0.5)


def test_the_seed_decides(settings: Settings) -> None:
    first, again, other = make(settings), make(settings), make(settings, seed=1)
    assert all(a.key == b.key and a.label == b.label for a, b in zip(first, again, strict=True))
    assert not {e.key for e in first} & {e.key for e in other}
