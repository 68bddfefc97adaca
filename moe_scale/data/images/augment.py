"""Kept pixels to what a model sees: cropped, mirrored and coloured at random in training, the middle in evaluation.

Shape suffixes: C colours, H height, W width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from moe_scale.config import ImageTextDataConfig

_ASPECTS = (3 / 4, 4 / 3)  # of random crops, as in arXiv 1409.4842
_TRIES = 10

_SIDES = (
    "left right leftwards? rightwards? clockwise anticlockwise counterclockwise east west mirrored "  # en
    "links? rechts? linke[rsn]? rechte[rsn]? "  # de, nl
    "izquierd[ao]s? derech[ao]s? "  # es
    "gauche droite? "  # fr
    "sinistr[ao] destr[ao] "  # it
    "esquerd[ao]s? direit[ao]s? "  # pt
    r"лев\w* прав\w* влево вправо слева справа "  # ru
)
_SCRIPT = "letters? numbers? digits? text sign logo button clock o.clock written word words label poster"
_NAMES_A_SIDE = re.compile(rf"\b(?:{'|'.join((_SIDES + _SCRIPT).split())})\b", re.IGNORECASE)


def mirrors_safely(texts: Iterable[str]) -> bool:
    """Whether none of an image's texts names a side (in seven languages) or speaks of something written (English)."""
    return not any(_NAMES_A_SIDE.search(text) for text in texts)


def sample_random(seed: int, sample: int) -> np.random.RandomState:
    """The random numbers of one global training sample: the same whichever rank or process draws them.

    ``RandomState`` because numpy promises that its numbers never change between releases.
    """
    return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, sample & 0xFFFFFFFF, sample >> 32])


def training_view(
    pixels_HWC: np.ndarray, config: ImageTextDataConfig, random: np.random.RandomState, *, mirrors: bool
) -> np.ndarray:
    """A random view of ``data.image_size``, [size, size, 3] uint8; the middle where ``data.augment`` is false.

    Args:
        mirrors: the image may be mirrored where ``data.mirror`` is safe.
    """
    if not config.augment:
        return middle_view(pixels_HWC, config.image_size)
    # The same numbers are drawn whatever the settings, so that one of them can be changed alone.
    crop_numbers, mirror_number, color_numbers = (
        random.uniform(size=(_TRIES, 4)),
        random.uniform(),
        random.uniform(size=3),
    )
    image = Image.fromarray(pixels_HWC)
    box = _crop_box(image.size, config.crop_area, crop_numbers)
    size = config.image_size
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if mirror_number < 0.5 and (config.mirror == "always" or (config.mirror == "safe" and mirrors)):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.color:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, number in zip(enhancers, color_numbers, strict=True):
            image = enhancer(image).enhance(1 + config.color * (2 * number - 1))
    return np.asarray(image)


def middle_view(pixels_HWC: np.ndarray, size: int) -> np.ndarray:
    """The middle square, scaled to [size, size, 3] uint8."""
    height, width = pixels_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels_HWC[top : top + side, left : left + side]
    if side == size:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


def normalized(views: Sequence[np.ndarray], config: ImageTextDataConfig) -> np.ndarray:
    """Views [B, H, W, 3] uint8 as [B, 3, H, W] float32, less the mean and divided by the deviation of each colour."""
    pixels_BHWC = np.stack(views).astype(np.float32) / 255
    mean_C, std_C = np.array(config.mean, dtype=np.float32), np.array(config.std, dtype=np.float32)
    pixels_BHWC = (pixels_BHWC - mean_C) / std_C
    return np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2))


def _crop_box(size: tuple[int, int], least_area: float, numbers: np.ndarray) -> tuple[float, float, float, float]:
    """A box of ``least_area`` to all of the image, of an aspect from 3:4 to 4:3 (Inception's crop, arXiv 1409.4842).

    The area is uniform, the aspect uniform in its logarithm. After ten boxes that do not fit into the image it is the
    middle square.
    """
    width, height = size
    for area_number, aspect_number, x_number, y_number in numbers:
        area = width * height * (least_area + (1 - least_area) * area_number)
        low, high = map(math.log, _ASPECTS)
        aspect = math.exp(low + (high - low) * aspect_number)
        box_width, box_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if box_width <= width and box_height <= height:
            left, top = (width - box_width) * x_number, (height - box_height) * y_number
            return left, top, left + box_width, top + box_height
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
