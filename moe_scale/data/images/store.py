"""The images of prepared data: kept decoded in one file and read in place, or read and decoded whenever one is needed.

Nothing here imports torch. Shape suffixes: H height, W width, C colours, I images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_scale.data.images.decode import UnreadableImageError, decode, read_bytes
from moe_scale.data.images.record import ImageTextReport, Place, Record
from moe_scale.data.images.sample import render
from moe_scale.data.images.split import thumbnail
from moe_scale.data.pairs.ragged import Ragged, RaggedWriter
from moe_scale.errors import ConfigError, Problem

_DECODED_AT_ONCE = 256
_USUAL_ASPECT = 1.4  # longer side to shorter side, to tell beforehand what images will take


@dataclass(frozen=True)
class ImageReader:
    """Gives the pixels of an image.

    Attributes:
        emoji: places are emoji, which are drawn.
        side: length of the shorter side.
        max_pixels: of an image, before it is decoded.
    """

    emoji: bool
    side: int
    max_pixels: int

    def read(self, place: Place) -> np.ndarray:
        """[H, W, 3] uint8.

        Raises:
            UnreadableImageError: as :func:`moe_scale.data.images.decode.read_bytes` and ``decode``.
        """
        if self.emoji:
            return render(place.name, self.side)
        return decode(read_bytes(place), side=self.side, max_pixels=self.max_pixels)


def fits(num_images: int, side: int, gib: float) -> bool:
    """Whether so many decoded images take about ``gib`` GiB at most."""
    return num_images * side * side * _USUAL_ASPECT * 3 <= gib * 2**30


class Decoded(NamedTuple):
    """What became of the images that were to be kept.

    Attributes:
        records: those whose images could be read; one whose pixels are those of an earlier record has given its texts
            to that one and is not here.
        thumbnails_IP: of each of them, as :func:`moe_scale.data.images.split.thumbnail` makes them.
    """

    records: list[Record]
    thumbnails_IP: np.ndarray


def keep_images(
    folder: Path, records: list[Record], reader: ImageReader, num_threads: int, report: ImageTextReport
) -> Decoded:
    """Decode all images into ``<folder>/images.bin``; those that cannot be read are counted.

    Threads suffice here: Pillow decodes and scales without holding Python's lock.

    Raises:
        ConfigError: at ``data.source``, when none can be read.
    """
    first: dict[tuple[str, bytes], Record] = {}
    shapes: list[tuple[int, int]] = []
    thumbnails: list[np.ndarray] = []
    kept: list[Record] = []
    with RaggedWriter(folder / "images", "u1") as images:
        for record, pixels_HWC in _decoded(records, reader, num_threads, report):
            digest = hashlib.sha256(repr(pixels_HWC.shape).encode() + pixels_HWC.tobytes()).digest()
            other = first.setdefault((record.part, digest), record)
            if other is not record:
                other.texts += [text for text in record.texts if text not in other.texts]
                other.mirrors = other.mirrors and record.mirrors
                report.remove("images with the pixels of another one, which has their texts as well")
                continue
            images.append(pixels_HWC.ravel())
            shapes.append(pixels_HWC.shape[:2])
            thumbnails.append(thumbnail(pixels_HWC))
            kept.append(record)
    if not kept:
        what = f"none of its {len(records):,} images can be read; skipped: {report.skips()}"
        raise ConfigError(Problem("data.source", what, "give images that Pillow reads, or raise data.max_pixels", True))
    np.save(folder / "images_shapes.npy", np.array(shapes, dtype=np.int64).reshape(-1, 2))
    return Decoded(kept, np.array(thumbnails, dtype=np.float32).reshape(len(kept), -1))


def _decoded(
    records: list[Record], reader: ImageReader, num_threads: int, report: ImageTextReport
) -> Iterator[tuple[Record, np.ndarray]]:
    def one(record: Record) -> np.ndarray | UnreadableImageError:
        assert record.place is not None, record.where
        try:
            return reader.read(record.place)
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        for some in _batched(records):
            for record, found in zip(some, pool.map(one, some), strict=True):
                if isinstance(found, UnreadableImageError):
                    skip_image(report, record.where, record.place, found)
                else:
                    yield record, found


def _batched(records: list[Record]) -> Iterator[list[Record]]:
    for first in range(0, len(records), _DECODED_AT_ONCE):
        yield records[first : first + _DECODED_AT_ONCE]


def skip_image(report: ImageTextReport, where: str, place: Place | None, error: UnreadableImageError) -> None:
    """Count an image that cannot be read, with its file."""
    name = f"{where}: {place.name}" if place is not None and Path(place.name).name not in where else where
    report.skip(error.reason, name, error.detail)


class KeptImages:
    """Decoded images, read in place."""

    def __init__(self, folder: Path):
        self._pixels = Ragged(folder / "images", "u1")
        self._shapes_I2 = np.load(folder / "images_shapes.npy")
        if len(self._pixels) != len(self._shapes_I2):
            raise ValueError("the files of the images are of unequal length")

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8."""
        height, width = self._shapes_I2[index]
        return np.array(self._pixels[index]).reshape(height, width, 3)

    def name(self, index: int) -> str:
        return f"kept image {index}"


class DistantImages:
    """Images that are read where they are and decoded each time."""

    def __init__(self, folder: Path, reader: ImageReader):
        self._names = Ragged(folder / "places", "u1")
        self._ranges_I2 = np.load(folder / "places_ranges.npy", mmap_mode="r")
        self._reader = reader

    def __len__(self) -> int:
        return len(self._names)

    def place(self, index: int) -> Place:
        start, size = self._ranges_I2[index]
        return Place(self._names[index].tobytes().decode(errors="surrogateescape"), int(start), int(size))

    def read(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8.

        Raises:
            UnreadableImageError: when it cannot be read.
        """
        return self._reader.read(self.place(index))

    def name(self, index: int) -> str:
        place = self.place(index)
        return place.name if place.size < 0 else f"{place.name}, bytes {place.start} to {place.start + place.size}"


def write_places(folder: Path, records: list[Record]) -> None:
    """Where the images of these records are, for :class:`DistantImages`."""
    places = [record.place for record in records if record.place is not None]
    with RaggedWriter(folder / "places", "u1") as names:
        for place in places:
            names.append(place.name.encode(errors="surrogateescape"))
    ranges = np.array([(place.start, place.size) for place in places], dtype=np.int64).reshape(-1, 2)
    np.save(folder / "places_ranges.npy", ranges)
