"""Decoding: every mode comes out upright in red, green and blue, and nothing unreadable is fatal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moe_scale.data.images.decode import UnreadableImageError, decode, read_bytes
from moe_scale.data.images.record import Place
from tests.unit.data.images.conftest import encoded, picture


def decoded(image: Image.Image, kind: str = "PNG", side: int = 20, **how: Any) -> np.ndarray:
    return decode(encoded(image, kind, **how), side=side, max_pixels=10**6)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_every_mode_gives_eight_bits_of_three_colours(mode: str) -> None:
    image = Image.new("I;16", (40, 30), 40_000) if mode == "I;16" else picture(1).convert(mode)
    pixels_HWC = decoded(image, "TIFF")
    assert pixels_HWC.shape == (20, 27, 3)
    assert pixels_HWC.dtype == np.uint8
    if mode == "I;16":
        assert abs(int(pixels_HWC[0, 0, 0]) - round(40_000 * 255 / 65_535)) <= 1


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (decoded(clear) == 255).all()
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    assert abs(int(decoded(half)[3, 3, 1]) - 127) <= 1


def test_an_image_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 10, 20))  # the left end
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: the left end is up
    pixels_HWC = decoded(image, "PNG", exif=exif)
    assert pixels_HWC.shape == (40, 20, 3)
    assert pixels_HWC[2].max() == 0
    assert pixels_HWC[-2].min() == 255


def test_a_long_image_loses_its_ends_evenly() -> None:
    image = Image.new("RGB", (400, 20), "white")
    image.paste("black", (190, 0, 210, 20))  # the middle
    pixels_HWC = decoded(image)
    assert pixels_HWC.shape == (20, 40, 3)
    assert pixels_HWC[:, 12:28].max() < 10
    assert pixels_HWC[:, :8].min() > 245


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no picture at all", "no image that Pillow knows"),
        (encoded(picture(2, (300, 300)), "PNG")[:200], "damaged image"),
        (encoded(picture(2, (300, 300)), "JPEG")[:700], "damaged image"),
        (encoded(Image.new("1", (1001, 1000))), "image of more than data.max_pixels"),
        (encoded(Image.new("1", (20_000, 20_000))), "image of more than data.max_pixels"),
    ],
)  # fmt: skip
def test_unreadable_images(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decode(content, side=20, max_pixels=10**6)
    assert caught.value.reason == reason


def test_bytes_of_a_file_and_of_a_part_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it: whoever opens it waits forever
    assert read_bytes(Place(str(path))) == b"0123456789"
    assert read_bytes(Place(str(path), 2, 3)) == b"234"
    for place, reason in {
        Place(str(tmp_path / "none")): "image file missing",
        Place(str(tmp_path)): "image file that cannot be read",
        Place(str(tmp_path / "pipe")): "image file that cannot be read",
        Place(str(path), 0, 0): "empty image file",
        Place(str(path), 0, 2**40): "image file too large",
    }.items():
        with pytest.raises(UnreadableImageError) as caught:
            read_bytes(place)
        assert caught.value.reason == reason
