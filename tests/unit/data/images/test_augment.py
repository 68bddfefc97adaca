"""Augmentation: what a random view can be, what is never mirrored, and that it is a function of the sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.augment import middle_view, mirrors_safely, normalized, sample_random, training_view

CONFIG = ImageTextDataConfig(image_size=16)


def gradient() -> np.ndarray:
    """Red rises from left to right, green from top to bottom."""
    pixels_HWC = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels_HWC[..., 0] = np.arange(60) * 4
    pixels_HWC[..., 1] = np.arange(40)[:, None] * 6
    return pixels_HWC


def views(config: ImageTextDataConfig, *, mirrors: bool, count: int = 60) -> list[np.ndarray]:
    return [training_view(gradient(), config, sample_random(3, n), mirrors=mirrors) for n in range(count)]


def mirrored(view: np.ndarray) -> bool:
    return bool(view[:, -1, 0].mean() < view[:, 0, 0].mean())


def test_a_view_is_a_function_of_seed_and_sample() -> None:
    first, again = views(CONFIG, mirrors=True), views(CONFIG, mirrors=True)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len({view.tobytes() for view in first}) == 60
    other = training_view(gradient(), CONFIG, sample_random(4, 0), mirrors=True)
    assert (other != first[0]).any()


@pytest.mark.parametrize(
    ("mirror", "safe", "some"),
    [("safe", True, True), ("safe", False, False), ("never", True, False), ("always", False, True)],
)
def test_mirroring(mirror: str, safe: bool, some: bool) -> None:
    turned = [mirrored(view) for view in views(replace(CONFIG, mirror=mirror), mirrors=safe)]
    assert (15 < sum(turned) < 45) if some else not any(turned)


def test_crops_keep_the_area_that_is_asked_for() -> None:
    """With steps of 4 a pixel the width of a crop can be read off its colours."""
    config = replace(CONFIG, crop_area=0.5, color=0.0, mirror="never")
    spans = []
    for view in views(config, mirrors=False, count=200):
        assert view.shape == (16, 16, 3)
        # A pixel of the view covers width / 16: its first and last column are width * 15 / 16 apart.
        width = (float(view[8, -2, 0]) - float(view[8, 1, 0])) / 4 * 16 / 13
        height = (float(view[-2, 8, 1]) - float(view[1, 8, 1])) / 6 * 16 / 13
        spans.append(width * height / (60 * 40))
    assert 0.45 < min(spans) < 0.6
    assert 0.8 < max(spans) < 1.05


def test_color_changes_colors_alone() -> None:
    plain = replace(CONFIG, crop_area=1.0, mirror="never", color=0.0)
    whole = views(plain, mirrors=False, count=1)[0]
    coloured = views(replace(plain, color=0.4), mirrors=False, count=20)
    ratios = [view.mean() / whole.mean() for view in coloured]
    assert min(ratios) < 0.85
    assert max(ratios) > 1.15


def test_without_augmentation_it_is_the_middle() -> None:
    view = training_view(gradient(), replace(CONFIG, augment=False), sample_random(0, 0), mirrors=True)
    assert (view == middle_view(gradient(), 16)).all()
    assert (middle_view(gradient(), 40) == gradient()[:, 10:50]).all()


def test_normalized_by_hand() -> None:
    config = replace(CONFIG, mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0))
    pixels_BCHW = normalized([np.full((2, 2, 3), (255, 51, 0), dtype=np.uint8)], config)
    assert pixels_BCHW.shape == (1, 3, 2, 2)
    assert pixels_BCHW.dtype == np.float32
    np.testing.assert_allclose(pixels_BCHW[0, :, 0, 0], [1.0, 0.2, -0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a man with a dog", True), ("a cat to the LEFT of a dog", False), ("flecha hacia la izquierda", False),
        ("стрелка влево", False), ("левая рука", False), ("three o’clock", False), ("a bright idea", True),
        ("nach rechts zeigender Finger", False), ("main droite", False), ("ABC button", False),
    ],
)  # fmt: skip
def test_what_names_a_side_is_not_mirrored(text: str, safe: bool) -> None:
    assert mirrors_safely(["something else", text]) == safe
