"""Bytes to pixels: red, green and blue, upright, and no larger than needed. Nothing here imports torch.

Shape suffixes: H height, W width, C colours.
"""

from __future__ import annotations

import io
import os
import stat

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moe_scale.data.images.record import Place

MAX_BYTES = 256 * 2**20
"""Of an encoded image: what is larger is no picture, or a trap."""

LONGEST_ASPECT = 2.0
"""Longer side to shorter side of the images that are kept: what is beyond is cut off evenly at both ends."""


class UnreadableImageError(Exception):
    """An image that cannot be used, and why: a reason that is the same for all of its kind, and a detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both as arguments, so that the error survives pickling
        self.reason, self.detail = reason, detail


def read_bytes(place: Place) -> bytes:
    """The encoded image.

    Raises:
        UnreadableImageError: when the file is missing, too large, or shorter than its archive says.
    """
    try:
        about = os.stat(place.name)
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for whoever writes to it
            raise UnreadableImageError("image file that cannot be read", "not a regular file")
        size = place.size if place.size >= 0 else about.st_size
        if size > MAX_BYTES:
            raise UnreadableImageError("image file too large", f"{size:,} bytes")
        with open(place.name, "rb") as file:
            file.seek(place.start)
            found = file.read(size)
    except OSError as error:
        reason = "image file missing" if isinstance(error, FileNotFoundError) else "image file that cannot be read"
        raise UnreadableImageError(reason, error.strerror or str(error)) from error
    if not found:
        raise UnreadableImageError("empty image file")
    return found


def decode(encoded: bytes, *, side: int, max_pixels: int) -> np.ndarray:
    """The pixels [H, W, 3] uint8, the shorter side ``side`` long: see :func:`shrink`.

    The size is looked at before anything is decoded, so that a small file cannot ask for much memory. Of an animation
    the first picture is taken; what is transparent is white.

    Raises:
        UnreadableImageError: for bytes that are no picture, are cut off, or stand for too many pixels.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImageError("image of more than data.max_pixels", f"{width} x {height}")
            image.draft("RGB", (2 * side, 2 * side))  # a JPEG can be decoded at a half, a quarter or an eighth
            image.load()
            return shrink(to_rgb(ImageOps.exif_transpose(image)), side)
    except UnidentifiedImageError:
        raise UnreadableImageError("no image that Pillow knows") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImageError("image of more than data.max_pixels", str(error).split(",")[0]) from None
    except UnreadableImageError:
        raise
    except Exception as error:  # damaged files make Pillow's parsers raise nearly anything
        raise UnreadableImageError("damaged image", f"{type(error).__name__}: {error}"[:120]) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Red, green and blue of 8 bits; transparent pixels over white; 16 bits of grey scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        grey_HW = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if grey_HW.max(initial=0) > 255 else 1.0
        return Image.fromarray((grey_HW * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def shrink(image: Image.Image, side: int) -> np.ndarray:
    """``image`` with its shorter side ``side`` long, its longer side at most twice that: [H, W, 3] uint8."""
    width, height = image.size
    longest = LONGEST_ASPECT * min(width, height)
    if max(width, height) > longest:
        cut_x, cut_y = max(0.0, (width - longest) / 2), max(0.0, (height - longest) / 2)
        box = (round(cut_x), round(cut_y), max(1, round(width - cut_x)), max(1, round(height - cut_y)))
        image = image.crop(box)
        width, height = image.size
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)  # with antialiasing where it gets smaller
    return np.asarray(image)
