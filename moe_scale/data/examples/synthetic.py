"""Sequences of features whose class depends on their order, and the control that has no classes to be found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_scale.config import ExampleDataConfig
from moe_scale.data.examples.example import Example

_NOISE = 0.5
_MAX_MARKS = 3


def synthetic_examples(
    config: ExampleDataConfig, *, input_size: int, num_classes: int, random_labels: bool
) -> Iterator[Example]:
    """``synthetic_examples`` sequences of noise in which prototypes of several classes occur at random positions.

    The class is that of the prototype that occurs first. Which ones occur does not tell it: with two classes every
    sequence has both, with more it has three that are drawn evenly. So it takes the order of the positions, and a
    model that adds them up is right as often as one in two or one in three.

    Args:
        random_labels: draw the labels, evenly and apart from the sequences. Nothing can do better than chance then.
    """
    draw = np.random.RandomState(config.synthetic_seed)
    prototypes_CI = draw.standard_normal((num_classes, input_size)).astype(np.float32)
    marks = min(num_classes, _MAX_MARKS)
    for number in range(config.synthetic_examples):
        length = draw.randint(max(marks, config.max_len // 2), config.max_len + 1)
        features_SI = (_NOISE * draw.standard_normal((length, input_size))).astype(np.float32)
        classes = draw.permutation(num_classes)[:marks]
        places = np.sort(draw.permutation(length)[:marks])
        features_SI[places] += prototypes_CI[classes]
        label = draw.randint(num_classes)  # drawn in either case, so that both sources have the same sequences
        yield Example(f"sequence {number}", (), features_SI, int(label if random_labels else classes[0]))
