"""The installed sample: what is in it, and that no near copy of a held-out image is trained on."""

from __future__ import annotations

import importlib.metadata
import itertools

import numpy as np
import pytest

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images import sample
from moe_scale.data.images.batches import eval_items
from moe_scale.data.images.prepare import PreparedImageText, prepare_image_text
from moe_scale.data.images.record import ImageTextReport
from moe_scale.data.images.sources import check_image_text
from moe_scale.data.images.split import NEAR_RMS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedImageText:
    cache = str(tmp_path_factory.mktemp("cache"))
    return prepare_image_text(ImageTextDataConfig(cache_dir=cache, tokenizer="bpe"), 2000)


def names(data: PreparedImageText, split: str, language: str) -> set[str]:
    found, number = data.split(split), data.languages.index(language)
    return {found.text(text) for text in np.flatnonzero(found.languages_T == number)}


def test_counts(prepared: PreparedImageText) -> None:
    report = prepared.report
    assert report.read == {"train": 1914}
    assert list(report.skipped.values()) == [9]
    assert report.removed == {
        "emoji that differ from another in the tone of the skin alone": 2040,
        "images with the pixels of another one, which has their texts as well": 21,
        "captions of training images in unseen languages: not trained on": 2 * report.texts["train"]["en"],
    }
    assert sum(report.kept.values()) == 1893
    assert (report.kept["valid"], report.kept["test"]) == (95, 190)
    for split, codes in {"train": "de en es fr it", "test": "de en es fr it pt ru"}.items():
        assert list(report.texts[split]) == codes.split()
        assert len(set(report.texts[split].values())) == 1
    assert sum(report.texts[split]["en"] for split in ("train", "valid", "test")) == 1914


def test_no_near_copy_across_the_split(prepared: PreparedImageText) -> None:
    """All pairs of held-out and training images, compared here by themselves."""
    small: dict[str, np.ndarray] = {}
    for name in ("train", "valid", "test"):
        images = [prepared.images.read(int(i)) for i in prepared.split(name).images_M]  # type: ignore[union-attr]
        side = images[0].shape[0] // 16 * 16
        grids = [image[:side, :side].reshape(16, side // 16, 16, side // 16, 3).mean((1, 3)) for image in images]
        small[name] = np.array(grids).reshape(len(images), -1) / 255
    for one, other in itertools.combinations(small, 2):
        rms = np.sqrt(((small[one][:, None] - small[other][None]) ** 2).mean(axis=2)) if one != "train" else np.array(
            [np.sqrt(((row - small[other]) ** 2).mean(axis=1)).min() for row in small[one]]
        )  # fmt: skip
        # The grid here is cut a little differently, so the limit is not exactly that of the split.
        assert rms.min() > 0.75 * NEAR_RMS
    groups = prepared.report.groups
    assert groups["groups"] > 100
    assert groups["images"] > 400


def test_no_name_is_on_both_sides(prepared: PreparedImageText) -> None:
    for language in ("en", "de", "fr"):
        train, valid, test = (names(prepared, split, language) for split in ("train", "valid", "test"))
        assert not train & test
        assert not train & valid
        assert not valid & test


def test_several_captions_of_one_image(prepared: PreparedImageText) -> None:
    """Emoji that are drawn alike, as the flags of Spain and of Ceuta and Melilla, are one image with both names."""
    rows = {}
    for captions in (1, 0):
        batches = eval_items(
            prepared, prepared.split("test"), prepared.config,
            language="ru", batch=64, rank=0, world_size=1, captions=captions,
        )  # fmt: skip
        rows[captions] = [item for batch in batches for item in batch.items_B[batch.present_B].tolist()]
    assert rows[1] == list(range(190))
    assert sorted(set(rows[0])) == rows[1]
    assert len(rows[0]) == 193


@pytest.mark.parametrize(
    "kind", [("man climbing", "woman climbing", "person climbing"), ("cook", "man cook", "woman cook"),
             ("three-thirty", "three o\u2019clock"), ("left arrow", "right arrow", "up-down arrow"),
             ("keycap 1", "keycap #"), ("family man woman boy", "family")],
)  # fmt: skip
def test_families(kind: tuple[str, ...], prepared: PreparedImageText) -> None:
    assert len({sample.family(name) for name in kind}) == 1
    sides = [split for split in ("train", "valid", "test") if names(prepared, split, "en") & set(kind)]
    assert len(sides) == 1
    assert sample.family("red apple") != sample.family("green apple")


def test_drawings_are_inside_of_their_canvas() -> None:
    drawn = [
        sample.render(emoji, 64) for emoji in ("\U0001f600", "\U0001f9d7\u200d\u2640\ufe0f", "\U0001f1ee\U0001f1f9")
    ]
    for pixels_HWC in drawn:
        assert pixels_HWC.shape == (64, 64, 3)
        assert (pixels_HWC[[0, -1]] == 255).all()
        assert (pixels_HWC != 255).any(axis=2).mean() > 0.1
    large = sample.render("\U0001f600", 300)
    assert large.shape == (300, 300, 3)
    assert (large != 255).any()


def test_what_has_a_glyph_and_what_may_be_mirrored() -> None:
    assert sample.has_glyph("\U0001f600")
    assert not sample.has_glyph("\U0010ffff")
    records = {record.texts[0].first: record for record in sample.emoji_records(("en",), ImageTextReport())}
    assert records["dog face"].mirrors
    assert not records["Italy"].mirrors
    assert not records["left arrow"].mirrors
    assert not records["three o\u2019clock"].mirrors


def test_a_missing_package_is_one_problem_for_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    found = check_image_text(ImageTextDataConfig(languages=("en", "de"), unseen_languages=("ru",)))
    assert [problem.where for problem in found] == ["data.source"] * 4
    assert all("-r requirements-samples.txt" in problem.allowed and problem.this_host_only for problem in found)
