"""What the settings of images and texts find wrong with themselves."""

from __future__ import annotations

from typing import Any

import pytest

from moe_scale.config import ImageTextDataConfig


def found(**given: Any) -> list[str]:
    return [str(problem) for problem in ImageTextDataConfig(**given).problems("data")]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"source": "glue/mrpc"},
        {"source": "pictures.jsonl", "images": "pictures"},
        {"source": "shards", "format": "shards", "heldout": "more"},
        {"source": "captions.json", "format": "coco", "images": "train2017", "test_fraction": 0.0, "heldout": "v.json"},
        {"source": "q.json", "format": "vqa", "answers": "a.json", "num_answers": 10},
        {"languages": ("en", "pt"), "unseen_languages": ("ru",)},
        {"source": "a.jsonl", "languages": ("pt-BR", "zh-Hant-TW"), "caption_language": "en-US"},
    ],
)  # fmt: skip
def test_settings_that_fit_together(given: dict[str, Any]) -> None:
    assert found(**given) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"source": "a.json"}, "data.format: auto with a.json, which may hold either; choose coco or vqa"),
        ({"source": "q.json", "format": "vqa"},
         "data.answers: the questions have no answers; name the .json file that has them"),
        ({"source": "q.json", "format": "vqa", "answers": "a.json", "heldout": "h.json"},
         "data.heldout_answers: the held-out questions have no answers; name the .json file that has them"),
        ({"format": "coco"}, "data.format: coco with data.source = sample; leave it out; it is for a path"),
        ({"source": "glue/rte", "languages": ("en",)},
         "data.languages: en with data.source = glue/rte; leave it out; it is for images with captions"),
        ({"source": "x.tar", "images": "y"},
         "data.images: y with data.source = x.tar; leave it out; it is for a .jsonl or .json file"),
        ({"heldout_images": "y"}, "data.heldout_images: y without data.heldout; set data.heldout"),
        ({"languages": ("EN",)}, "data.languages: 'EN'; write language codes, as en or pt-BR"),
        ({"languages": ("en", "en")}, "data.languages: en is named twice; name it once"),
        ({"caption_language": "english"}, "data.caption_language: 'english'; write a language code, as en or pt-BR"),
        ({"languages": ("en", "ru"), "unseen_languages": ("ru",)},
         "data.unseen_languages: ru, to be trained on as well; name a language in one of the two"),
        ({"valid_fraction": 0.0}, "data.valid_fraction: 0 leaves nothing to evaluate on; choose more than 0"),
        ({"test_fraction": 0.0}, "data.test_fraction: 0, and sample has no held-out part of its own; choose more than "
         "0, or set data.heldout"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5},
         "data.test_fraction: data.valid_fraction + data.test_fraction = 1 leaves nothing to train on; choose less"),
        ({"std": (1.0, 0.0, 1.0)}, "data.std: 1.0 0.0 1.0; give three finite numbers above 0"),
        ({"mean": (1.0, float("nan"), 1.0)}, "data.mean: 1.0 nan 1.0; give three finite numbers"),
    ],
)  # fmt: skip
def test_settings_that_do_not(given: dict[str, Any], expected: str) -> None:
    assert found(**given) == [expected]


def test_every_problem_is_reported_at_once() -> None:
    assert len(found(source="a.json", valid_fraction=0.0, std=(0.0, 0.0, 0.0), languages=("1",))) == 4


def test_what_a_source_is_learned_for() -> None:
    outputs = {
        "sample": ("retrieval", 0),
        "glue/mnli": ("classification", 3),
        "glue/stsb": ("regression", 1),
        "a.tar": ("retrieval", 0),
    }
    for source, expected in outputs.items():
        config = ImageTextDataConfig(source=source)
        assert (config.goal, config.num_outputs) == expected
    vqa = ImageTextDataConfig(source="q.json", format="vqa", answers="a.json", num_answers=7)
    assert (vqa.goal, vqa.num_outputs, vqa.has_images) == ("classification", 7, True)


def test_unseen_languages_of_the_sample() -> None:
    assert ImageTextDataConfig().unseen == ("pt", "ru")
    assert ImageTextDataConfig(languages=("en", "pt")).unseen == ("ru",)
    assert ImageTextDataConfig(unseen_languages=("ja",)).unseen == ("ja",)
    assert ImageTextDataConfig(source="a.jsonl").unseen == ()


def test_no_crop_is_enlarged() -> None:
    assert ImageTextDataConfig(image_size=64, crop_area=0.25).stored_size == 128
    assert ImageTextDataConfig(image_size=64, crop_area=0.25, augment=False).stored_size == 64
