"""Near copies stay on one side of the split."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.record import ImageTextReport, Place, Record, Text
from moe_scale.data.images.split import NEAR_RMS, Groups, assign_splits, describe_groups, near_groups, near_pairs
from moe_scale.errors import ConfigError


def record(number: int, caption: str = "", family: str = "", part: str = "train") -> Record:
    text = Text("en", caption or f"caption {number}")
    return Record(f"image {number}", Place(str(number)), [text], part, family)


def test_groups_are_joined_through_others() -> None:
    groups = Groups(6)
    for one, other in ((4, 2), (5, 4), (0, 1)):
        groups.join(one, other)
    assert [groups.find(member) for member in range(6)] == [0, 0, 2, 3, 2, 2]


def test_pairs_against_all_differences() -> None:
    random = np.random.RandomState(0)
    thumbnails = random.uniform(size=(30, 48)).astype(np.float32)
    near = thumbnails[:10] + random.uniform(-1, 1, size=(10, 1)).astype(np.float32) * 0.08
    every = np.concatenate([thumbnails, near])
    rms = np.sqrt(((every[:, None].astype(np.float64) - every[None]) ** 2).mean(axis=2))
    expected = {(a, b) for a in range(40) for b in range(a + 1, 40) if rms[a, b] < NEAR_RMS}
    assert set(near_pairs(every)) == expected
    assert 2 < len(expected) < 10


def test_what_makes_near_copies() -> None:
    records = [
        record(0, "A dog!"), record(1, "a dog"), record(2, family="x"), record(3, family="x"), record(4), record(5)
    ]  # fmt: skip
    thumbnails = np.zeros((6, 3), dtype=np.float32) + np.arange(6, dtype=np.float32)[:, None] / 6
    thumbnails[5] = thumbnails[4] + 0.01
    groups = near_groups(records, thumbnails, by_caption=True)
    assert groups.tolist() == [0, 0, 2, 2, 4, 4]
    assert describe_groups(groups) == {"groups": 3, "images": 6, "largest": 2}
    assert near_groups(records, None, by_caption=False).tolist() == [0, 1, 2, 2, 4, 5]
    alone = [Record("a", None, [Text("en", "one", "two")]), Record("b", None, [Text("en", "One", "two.")])]
    assert near_groups(alone, None, by_caption=False).tolist() == [0, 0]


def test_whole_groups_are_held_out_and_fractions_are_met() -> None:
    records = [record(number) for number in range(200)]
    groups = np.arange(200) // 3 * 3
    config = ImageTextDataConfig(valid_fraction=0.1, test_fraction=0.2)
    splits = assign_splits(records, groups, config, ImageTextReport())
    places = {name: [records.index(one) for one in found] for name, found in splits.items()}
    assert sorted(functools.reduce(operator.iadd, places.values(), [])) == list(range(200))
    assert 38 <= len(places["test"]) <= 40
    assert 18 <= len(places["valid"]) <= 20
    sides = [{place // 3 for place in found} for found in places.values()]
    assert not any(a & b for n, a in enumerate(sides) for b in sides[n + 1 :])
    assert places["train"] == sorted(places["train"])
    assert places["test"] != list(range(len(places["test"]))), "not the first ones"


def test_a_group_that_is_too_large_is_trained_on() -> None:
    records = [record(number) for number in range(100)]
    groups = np.where(np.arange(100) < 60, 0, np.arange(100))
    splits = assign_splits(records, groups, ImageTextDataConfig(), ImageTextReport())
    assert set(range(60)) <= {records.index(one) for one in splits["train"]}


def test_held_out_parts_keep_their_records() -> None:
    records = [*(record(n) for n in range(40)), record(40, part="test"), record(41, part="test")]
    groups = np.arange(42)
    groups[41] = 7  # image 7 of training is a near copy of a held-out one
    report = ImageTextReport()
    config = ImageTextDataConfig(source="a.jsonl", heldout="b.jsonl", test_fraction=0.9)
    splits = assign_splits(records, groups, config, report)
    assert [one.where for one in splits["test"]] == ["image 40", "image 41"]
    assert records[7] not in splits["train"] + splits["valid"]
    assert len(splits["train"]) + len(splits["valid"]) == 39
    assert list(report.removed.values()) == [1]


def test_too_few_records() -> None:
    with pytest.raises(ConfigError, match="nothing is left in the train split"):
        assign_splits([record(0), record(1)], np.arange(2), ImageTextDataConfig(), ImageTextReport())
