"""Prepared images and texts: what is kept, what is skipped and told, and when it is made again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.examples.vocabulary import Subwords
from moe_scale.data.images.batches import eval_batches
from moe_scale.data.images.prepare import PreparedImageText, image_text_fingerprint, prepare_image_text
from moe_scale.data.images.record import Text
from moe_scale.data.images.split_files import encode_text
from moe_scale.data.images.store import DistantImages, KeptImages
from moe_scale.data.subwords import train_model
from moe_scale.errors import ConfigError
from tests.unit.data.images.conftest import encoded, folder_of_pictures, picture

VOCABULARY = 330


@pytest.fixture
def config(tmp_path: Path) -> ImageTextDataConfig:
    path = folder_of_pictures(tmp_path / "pictures", 40)
    return ImageTextDataConfig(
        source=str(path), image_size=16, cache_dir=str(tmp_path / "cache"), tokenizer="bpe", unseen_languages=("de",)
    )


def all_texts(data: PreparedImageText) -> list[str]:
    return [split.text(text) for split in data.splits.values() for text in range(split.num_texts)]


def test_pixels_and_texts_belong_together(config: ImageTextDataConfig) -> None:
    data = prepare_image_text(config, VOCABULARY)
    assert isinstance(data.images, KeptImages)
    for split in data.splits.values():
        for text in range(split.num_texts):
            number = int(split.text(text).split()[4])
            expected = np.asarray(picture(number))[15, 20]
            pixels_HWC = data.images.read(int(split.images_M[split.items_T[text]]))
            assert min(pixels_HWC.shape[:2]) == config.stored_size
            middle = pixels_HWC[pixels_HWC.shape[0] // 2 + 2, pixels_HWC.shape[1] // 2 + 2]
            assert np.abs(middle.astype(int) - expected).max() < 8
            assert data.vocabulary.decode(split.tokens(text).tolist()) == split.text(text)
            assert split.tokens(text)[0] == data.vocabulary.bos_id


def test_unseen_languages_are_not_trained_on(config: ImageTextDataConfig) -> None:
    data = prepare_image_text(config, VOCABULARY)
    assert data.report.texts == {
        "train": {"en": 34}, "valid": {"de": 2, "en": 2}, "test": {"de": 4, "en": 4}, "mismatched": {}
    }  # fmt: skip
    assert data.report.removed == {"captions of training images in unseen languages: not trained on": 34}


def test_unreadable_images_are_counted_with_their_names(config: ImageTextDataConfig) -> None:
    folder = Path(config.source).parent
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "4.png").unlink()
    (folder / "5.png").write_bytes(encoded(picture(5))[:120])
    (folder / "6.png").write_bytes(encoded(picture(6, (3000, 2000))))
    (folder / "7.png").write_bytes((folder / "8.png").read_bytes())
    data = prepare_image_text(replace(config, max_pixels=10**6), VOCABULARY)
    assert data.report.skipped == {
        "no image that Pillow knows": 1, "image file missing": 1, "damaged image": 1,
        "image of more than data.max_pixels": 1,
    }  # fmt: skip
    assert "4.png" in str(data.report)
    assert data.report.removed["images with the pixels of another one, which has their texts as well"] == 1
    assert sum(data.report.kept.values()) == 35
    numbers = {int(text.split()[4]) for text in all_texts(data)}
    assert numbers == set(range(40)) - {3, 4, 5, 6}
    assert "skipped: 1 no image that Pillow knows" in str(data.report)


def test_images_none_of_which_can_be_read_are_one_message(config: ImageTextDataConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_image_text(replace(config, max_pixels=10), VOCABULARY)
    (problem,) = caught.value.problems
    assert problem.where == "data.source"
    assert problem.what.startswith("none of its 40 images can be read; skipped: ")
    assert "image of more than data.max_pixels" in problem.what


def test_images_that_are_not_kept_give_the_same_batches(config: ImageTextDataConfig) -> None:
    kept = prepare_image_text(config, VOCABULARY)
    far = replace(config, cache_gib=0.0)
    distant = prepare_image_text(far, VOCABULARY)
    assert isinstance(distant.images, DistantImages)
    assert "not compared" in distant.report.compared
    for name in ("train", "test"):
        first = next(eval_batches(kept, kept.split(name), config, batch=4, rank=0, world_size=1))
        other = next(eval_batches(distant, distant.split(name), far, batch=4, rank=0, world_size=1))
        assert first.images_BCHW is not None
        assert other.images_BCHW is not None
        assert first.images_BCHW.equal(other.images_BCHW)
        assert first.ids_BS.equal(other.ids_BS)


def test_the_name_of_the_folder_follows_what_it_is_made_of(config: ImageTextDataConfig) -> None:
    name = image_text_fingerprint(config, VOCABULARY)
    same = replace(config, batch_examples=3, num_workers=0, mean=(0.0, 0.0, 0.0), color=0.5, cache_dir="elsewhere")
    assert image_text_fingerprint(same, VOCABULARY) == name
    changed = [replace(config, image_size=20), replace(config, max_len=20), replace(config, crop_area=0.3)]
    assert name not in [image_text_fingerprint(one, VOCABULARY) for one in changed]
    assert image_text_fingerprint(config, 400) != name
    folder = Path(config.source).parent
    (folder / "notes.txt").write_text("no image")
    assert image_text_fingerprint(config, VOCABULARY) == name
    (folder / "3.png").write_bytes(encoded(picture(77)))
    changed_name = image_text_fingerprint(config, VOCABULARY)
    assert changed_name != name
    (folder / "41.png").symlink_to(folder / "nowhere.png")
    assert image_text_fingerprint(config, VOCABULARY) not in (name, changed_name)


def test_a_damaged_cache_is_told(config: ImageTextDataConfig) -> None:
    data = prepare_image_text(config, VOCABULARY)
    (data.folder / "images.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^data.cache_dir: the prepared images and texts in .* are damaged"):
        prepare_image_text(config, VOCABULARY)


def test_content_is_equal_wherever_the_files_are(config: ImageTextDataConfig, tmp_path: Path) -> None:
    other = folder_of_pictures(tmp_path / "elsewhere", 40)
    first = prepare_image_text(config, VOCABULARY)
    again = prepare_image_text(replace(config, source=str(other)), VOCABULARY)
    assert first.folder != again.folder
    assert first.fingerprint == again.fingerprint


def test_answers_are_numbered_by_how_often_they_are_given(tmp_path: Path) -> None:
    questions, annotations = [], []
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
        answer = "yes" if number % 2 else ("no" if number % 4 else f"{number} things")
        questions.append({"image_id": number, "question_id": number, "question": "what is it?"})
        annotations.append({"question_id": number, "multiple_choice_answer": answer,
                            "answers": [{"answer": answer}, {"answer": "maybe"}]})  # fmt: skip
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    config = ImageTextDataConfig(
        source=str(tmp_path / "q.json"), format="vqa", answers=str(tmp_path / "a.json"), num_answers=2, image_size=16,
        cache_dir=str(tmp_path / "cache"), tokenizer="bpe", test_fraction=0.3,
    )  # fmt: skip
    data = prepare_image_text(config, 270)
    assert data.answers == ("yes", "no")
    train, test = data.split("train"), data.split("test")
    assert set(train.labels_T.tolist()) == {0.0, 1.0}
    dropped = data.report.removed["training questions whose answer is not one of data.num_answers"]
    assert train.num_texts + dropped + test.num_texts + data.split("valid").num_texts == 60
    assert test.num_texts == 18
    assert np.isnan(test.labels_T).sum() == sum("things" in test.answers(text)[0] for text in range(18)) > 0
    for text in range(18):
        assert test.answers(text)[1] == "maybe"


def test_pairs_lose_the_end_of_the_longer_text() -> None:
    sentences = [f"{a} {b}" for a in "abcdefgh" for b in "ijklmnop"]
    vocabulary = Subwords(train_model(sentences, kind="bpe", vocab_size=290))
    (_a,), (_i,) = (vocabulary.encode(letter)[-1:] for letter in ("a", "i"))
    long_first = encode_text(Text("en", "a a a a a a a a", "i i"), vocabulary, 9)
    assert not long_first[2]
    assert len(long_first[0]) == 9
    ids, second, whole = encode_text(Text("en", "a a", "i"), vocabulary, 32)
    assert whole
    assert ids[0] == vocabulary.bos_id
    assert ids[second - 1] == vocabulary.separator_id
    assert vocabulary.decode(ids[1 : second - 1]) == "a a"
    assert vocabulary.decode(ids[second:]) == "i"
    ids, second, whole = encode_text(Text("en", "a", "i i i i i i i i i"), vocabulary, 8)
    assert (len(ids), whole) == (8, False)
    assert vocabulary.decode(ids[1 : second - 1]) == "a"
    assert len(encode_text(Text("en", "a " * 40), vocabulary, 8)[0]) == 8
