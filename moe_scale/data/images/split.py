"""Which images are trained on and which are held out, with all near copies of an image on its side.

Two images are near copies if their pixels are nearly the same, if a caption of one is a caption of the other, or if the
source says so (:attr:`Record.family`); and so are those that are near copies of one image.

Shape suffixes: R records, P values of a thumbnail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.record import ImageTextReport, Record
from moe_scale.data.pairs.sentences import sentence_key, stable_hash
from moe_scale.errors import ConfigError, Problem

THUMBNAIL = 16
"""Height and width at which images are compared."""

NEAR_RMS = 0.04
"""Root of the mean squared difference of the colours, of 0 to 1, of thumbnails below which images are near copies."""

COMPARED_AT_MOST = 30_000
"""Images of which all pairs are compared, which takes about a minute; of more, equal pixels are found alone."""

_ROWS_AT_ONCE = 1024


def thumbnail(pixels_HWC: np.ndarray) -> np.ndarray:
    """The mean colours of a grid of 16 x 16, [P] float32 of 0 to 1."""
    small = Image.fromarray(pixels_HWC).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return (np.asarray(small, dtype=np.float32) / 255).ravel()


class Groups:
    """Disjoint sets of records, joined pair by pair."""

    def __init__(self, size: int):
        self._parents = list(range(size))

    def find(self, member: int) -> int:
        """The set's smallest member."""
        while self._parents[member] != member:
            self._parents[member] = self._parents[self._parents[member]]
            member = self._parents[member]
        return member

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parents[high] = low

    def join_equal(self, keys: Iterable[tuple[int, object]]) -> None:
        """Join the members (first of each pair) whose keys are equal."""
        first: dict[object, int] = {}
        for member, key in keys:
            self.join(member, first.setdefault(key, member))


def near_groups(records: list[Record], thumbnails_RP: np.ndarray | None, *, by_caption: bool) -> np.ndarray:
    """The group of each record, [R] int64: the place of its first member.

    Args:
        thumbnails_RP: of the images, in the order of the records; None where they were not decoded.
        by_caption: equal captions make near copies. For examples of texts alone it is equal texts in any case; for
            questions it is not, as the same are asked about many images.
    """
    groups = Groups(len(records))
    groups.join_equal((place, record.family) for place, record in enumerate(records) if record.family)
    groups.join_equal(
        (place, (text.language, sentence_key(text.first), sentence_key(text.second)))
        for place, record in enumerate(records)
        if by_caption or record.place is None
        for text in record.texts
    )
    if thumbnails_RP is not None and len(records) <= COMPARED_AT_MOST:
        for one, other in near_pairs(thumbnails_RP):
            groups.join(one, other)
    return np.array([groups.find(place) for place in range(len(records))], dtype=np.int64)


def near_pairs(thumbnails_RP: np.ndarray) -> Iterable[tuple[int, int]]:
    """All pairs of images whose thumbnails differ by less than :data:`NEAR_RMS`, the smaller place first."""
    centred_RP = thumbnails_RP - thumbnails_RP.mean(axis=0)  # smaller numbers, so less is lost to rounding
    squares_R = (centred_RP**2).sum(axis=1)
    limit = NEAR_RMS**2 * thumbnails_RP.shape[1]
    for first in range(0, len(centred_RP), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        distances = squares_R[rows, None] + squares_R[None] - 2 * centred_RP[rows] @ centred_RP.T
        for row, column in zip(*np.nonzero(distances < limit), strict=True):
            if first + row < column:
                yield int(first + row), int(column)


def assign_splits(
    records: list[Record], groups_R: np.ndarray, config: ImageTextDataConfig, report: ImageTextReport
) -> dict[str, list[Record]]:
    """The records of each split in the order of the source; no group is in two of them.

    Whole groups are taken in the order of their hashes, which is as good as random and the same on every machine: for
    the test until ``data.test_fraction`` of the records is reached, then for validation. One that would be too many is
    trained on. Where the source has a held-out part of its own, that is the test, and near copies of it in training are
    left out.

    Raises:
        ConfigError: at ``data.source``, when training, validation or the test is left without a record.
    """
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups_R.tolist()):
        members.setdefault(group, []).append(place)
    held_out = {group for group, places in members.items() if any(records[p].part != "train" for p in places)}
    split = {place: records[place].part for group in held_out for place in members[group]}
    dropped = [place for place, part in split.items() if part == "train"]
    report.remove("training records that are near copies of held-out ones: not trained on", len(dropped))
    free = [places for group, places in members.items() if group not in held_out]
    free.sort(key=lambda places: (stable_hash(records[places[0]].where), places[0]))
    count = sum(map(len, free))
    wanted = {
        "test": 0 if held_out else math.ceil(config.test_fraction * count - 1e-9),
        "valid": math.ceil(config.valid_fraction * count - 1e-9),
    }
    for places in free:
        name = next((name for name, left in wanted.items() if 0 < len(places) <= left), "train")
        if name in wanted:
            wanted[name] -= len(places)
        split |= dict.fromkeys(places, name)
    for place in dropped:
        del split[place]
    found: dict[str, list[Record]] = {name: [] for name in ("train", "valid", "test", "mismatched")}
    for place in sorted(split):
        found[split[place]].append(records[place])
    for name in ("train", "valid", "test"):
        if not found[name]:
            what = f"nothing is left in the {name} split: {report}"
            raise ConfigError(Problem("data.source", what, "give more records, or choose other fractions", True))
    return found


def describe_groups(groups_R: np.ndarray) -> dict[str, int]:
    """Groups of two and more: their number, the records in them, and the largest."""
    sizes = np.bincount(groups_R) if len(groups_R) else np.zeros(1, dtype=np.int64)
    several = sizes[sizes > 1]
    return {"groups": len(several), "images": int(several.sum()), "largest": int(sizes.max(initial=0))}
