"""The forms that images and texts come in, and that what cannot be used is counted with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.record import ImageTextReport, Record
from moe_scale.data.images.sources import check_image_text, read_source
from moe_scale.data.images.store import ImageReader
from moe_scale.errors import ConfigError
from tests.unit.data.images.conftest import add_member, encoded, folder_of_pictures, picture, write_shard


def read(**given: Any) -> tuple[list[Record], ImageTextReport]:
    report = ImageTextReport()
    return read_source(ImageTextDataConfig(**given), report), report


def texts(record: Record) -> list[tuple[str, str]]:
    return [(text.language, text.first) for text in record.texts]


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        {"image": "a.png", "caption": "one"},
        {"image": "b.png", "caption": ["two", "zwei "]},
        {"image": "c.png", "caption": {"en": "three", "de": ["drei", "Drei"]}},
        {"image": "d.png", "caption": "quatre", "language": "fr"},
        {"image": "a.png", "caption": "uno"},
        {"image": "e.png", "caption": ""},
        {"image": "f.png", "caption": [1]},
        {"image": 7, "caption": "seven"},
        {"caption": "lost"},
        {"image": "g.png", "caption": "\ud800"},
        {"image": "\ud800.png", "caption": "no file can be called so"},
        {"image": "h.png", "caption": {"\ud800": "eight", "": "huit"}},
        {"image": "h.png", "caption": "acht", "language": " "},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n\n")
    records, report = read(source=str(path))
    assert [texts(record) for record in records] == [
        [("en", "one"), ("en", "uno")],
        [("en", "two"), ("en", "zwei")],
        [("en", "three"), ("de", "drei"), ("de", "Drei")],
        [("fr", "quatre")],
    ]
    assert records[0].place is not None
    assert records[0].place.name == str(tmp_path / "a.png")
    assert report.skipped == {
        "empty text": 1, "not text": 1, "no name of an image file": 2, "missing field": 1, "not valid Unicode": 1,
        "no language code": 3, "not JSON": 1, "empty line": 1, "image without a caption": 4,
    }  # fmt: skip
    assert report.examples["empty text"] == ["x.jsonl, line 6"]


def test_languages_that_are_not_asked_for_are_counted(tmp_path: Path) -> None:
    path = folder_of_pictures(tmp_path / "p", 3, ("en", "de", "ru", "it"))
    records, report = read(source=str(path.parent), languages=("de",), unseen_languages=("ru",))
    assert [text.language for text in records[0].texts] == ["de", "ru"]
    assert report.removed == {"captions in languages that are not asked for": 6}
    with pytest.raises(ConfigError, match=r"data.unseen_languages: .* has no caption in fr; it has de, en, it, ru"):
        read(source=str(path), unseen_languages=("fr",))


def test_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", 0, 3)
    with tarfile.open(tmp_path / "00001.tar", "w") as archive:
        add_member(archive, "a/7.json", json.dumps({"caption": {"de": "sieben"}}).encode())
        add_member(archive, "a/7.webp", encoded(picture(7), "WEBP"))
        add_member(archive, "a/8.txt", b"without an image")
        add_member(archive, "a/9.png", encoded(picture(9)))
        add_member(archive, "a/10.PNG", encoded(picture(10)))
        add_member(archive, "a/10.json", b"[]")
        add_member(archive, "a/11.png", encoded(picture(11)))
        add_member(archive, "a/11.txt", "elf\u00e4hnlich".encode("latin-1"))
    records, report = read(source=str(tmp_path))
    assert [texts(record) for record in records] == [
        *([("en", f"a picture with the number {n}")] for n in range(3)),
        [("de", "sieben")],
    ]
    assert report.skipped == {
        "no image under a name": 1, "image without a caption": 3, "not a JSON object": 1, "not valid Unicode": 1,
    }  # fmt: skip
    assert report.examples["no image under a name"] == ["00001.tar, a/8"]
    place = records[3].place
    assert place is not None
    pixels_HWC = ImageReader(False, 30, 10**6).read(place)
    assert pixels_HWC.shape == (30, 40, 3)


def test_a_shard_that_ends_early_gives_what_is_whole(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tar", 0, 4).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) * 5 // 8])
    (tmp_path / "b.tar").write_bytes(b"no archive")
    records, report = read(source=str(tmp_path), format="shards")
    assert 1 <= len(records) < 4
    reason = "shard that is damaged from here on"
    assert report.skipped[reason] == 2
    assert report.examples[reason][0].startswith("a.tar after")


def test_coco(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 5, "file_name": "5.jpg"}, {"id": 6, "file_name": "6.jpg"}],
        "annotations": [
            {"image_id": 5, "caption": "a dog"}, {"image_id": 5, "caption": "the dog"}, {"image_id": 9, "caption": "x"},
        ],
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    given = {"source": str(tmp_path / "c.json"), "format": "coco", "images": str(tmp_path / "images")}
    records, report = read(**given)
    assert [texts(record) for record in records] == [[("en", "a dog"), ("en", "the dog")]]
    assert report.skipped == {"caption of an image that the file does not name": 1, "image without a caption": 1}
    (tmp_path / "c.json").write_text('{"images": []}')
    with pytest.raises(ConfigError, match=r"c.json has no list 'annotations'; it has images"):
        read(**given)


def test_coco_with_entries_of_another_form(tmp_path: Path) -> None:
    """They are counted: none ends the run, and none takes the place of what is well formed."""
    (tmp_path / "c.json").write_text(json.dumps({
        "images": [{"id": 5, "file_name": "5.jpg"}, {"id": [5], "file_name": "5.jpg"}, {"id": 6, "file_name": "\0"}, 7],
        "annotations": [{"image_id": 5, "caption": "a dog"}, {"image_id": [5], "caption": "x"}, {"caption": "y"}],
    }))  # fmt: skip
    records, report = read(source=str(tmp_path / "c.json"), format="coco", images=str(tmp_path))
    assert [texts(record) for record in records] == [[("en", "a dog")]]
    assert report.skipped == {
        "no id and name of an image file": 3, "caption of an image that the file does not name": 2,
    }  # fmt: skip


def test_vqa(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "COCO_val2014_000000000012.jpg").write_bytes(encoded(picture(1), "JPEG"))
    questions = [
        {"image_id": 12, "question_id": 1, "question": "What is it?"},
        {"image_id": 12, "question_id": 2, "question": "How many?"},
        {"image_id": 13, "question_id": 1, "question": "Where?"},
    ]
    people = [{"answer": answer} for answer in ("dog", "dog", "cat")]
    answers = [{"question_id": 1, "multiple_choice_answer": "dog", "answers": people}]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    given = {"source": str(tmp_path / "q.json"), "format": "vqa", "answers": str(tmp_path / "a.json")}
    records, report = read(**given, images=str(folder))
    (record,) = records
    assert [(text.first, text.answers) for text in record.texts] == [("What is it?", ("dog", "dog", "dog", "cat"))]
    assert report.skipped == {"question without an answer": 1, "image file missing": 1}
    with pytest.raises(ConfigError, match="has no image whose name ends in a number"):
        read(**given)


@pytest.mark.parametrize(
    "other",
    [
        {"question_id": [1], "multiple_choice_answer": "dog"},
        {"question_id": 2, "multiple_choice_answer": "dog", "answers": 5},
        {"question_id": 2, "multiple_choice_answer": "\ud800"},
    ],
)
def test_vqa_with_entries_of_another_form(other: dict[str, Any], tmp_path: Path) -> None:
    """They are counted, and none ends the run."""
    (tmp_path / "1.png").touch()
    questions = [{"image_id": 1, "question_id": number, "question": "What?"} for number in (1, 2, [1])]
    answers = [{"question_id": 1, "multiple_choice_answer": "cat"}, other]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    given = {"source": str(tmp_path / "q.json"), "format": "vqa", "answers": str(tmp_path / "a.json")}
    (record,), report = read(**given)
    assert [text.answers for text in record.texts] == [("cat", "cat")]
    assert report.skipped == {"question without an answer": 2}


@pytest.mark.parametrize(
    ("given", "where", "what"),
    [
        ({"source": "nowhere"}, "data.source", "'nowhere' does not exist"),
        ({"source": "{tmp}"}, "data.source", "has neither metadata.jsonl nor metadata.jsonl.gz nor a .tar file"),
        ({"source": "{tmp}", "format": "shards"}, "data.source", "has no .tar file"),
        ({"source": "{tmp}/a.txt"}, "data.source", "a.txt is of no supported kind"),
        ({"source": "{tmp}/a.json", "format": "jsonl"}, "data.source", "a.json is of no supported kind"),
        ({"source": "{tmp}/empty.jsonl"}, "data.source", "has no record"),
        ({"source": "{tmp}/a.jsonl", "images": "{tmp}/none"}, "data.images", "does not exist"),
        ({"source": "{tmp}/a.jsonl", "image_field": "file"}, "data.image_field", "has no field 'file'"),
        ({"source": "{tmp}/a.jsonl", "caption_field": "text"}, "data.caption_field", "has no field 'text'"),
        ({"source": "{tmp}/a.jsonl", "heldout": "none.jsonl"}, "data.heldout", "'none.jsonl' does not exist"),
        ({"source": "{tmp}/a.json", "format": "vqa", "answers": "none"}, "data.answers", "none does not exist"),
        ({"languages": ("en", "fi")}, "data.languages", "the sample has no fi"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_is_read(
    given: dict[str, Any], where: str, what: str, tmp_path: Path
) -> None:
    for name in ("a.txt", "empty.jsonl", "a.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "a.jsonl").write_text('{"image": "a", "caption": "b"}\n')
    given = {name: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
             for name, value in given.items()}  # fmt: skip
    problem = check_image_text(ImageTextDataConfig(**given))[0]
    assert problem.where == where
    assert what in problem.what


@pytest.mark.parametrize(("compress", "how"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_compressed_shard_is_told_from_a_damaged_one(
    compress: Callable[[bytes], bytes], how: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(compress(bytes(1024)))
    (problem,) = check_image_text(ImageTextDataConfig(source=str(tmp_path)))
    assert str(problem) == f"data.source: {tmp_path}/a.tar is compressed ({how}); unpack it to a plain .tar"


@pytest.mark.parametrize("given", [{}, {"format": "vqa"}])
def test_what_settings_say_of_themselves_is_not_said_again(given: dict[str, Any], tmp_path: Path) -> None:
    """A .json file of either kind, and questions without answers, are the settings' own problems."""
    (tmp_path / "a.json").write_text("{}")
    config = ImageTextDataConfig(source=str(tmp_path / "a.json"), **given)
    assert len(config.problems("data")) == 1
    assert check_image_text(config) == []


def test_glue_pairs_scores_and_both_sets_of_mnli(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(repository: str, task: str, split: str) -> list[dict[str, Any]]:
        first, second = ("premise", "hypothesis") if task == "mnli" else ("sentence1", "sentence2")
        return [{first: f"{split} {n}", second: "no", "label": label} for n, label in enumerate((0, 2.5, -1))]

    monkeypatch.setattr(datasets, "load_dataset", load)
    records, report = read(source="glue/stsb")
    assert [(r.part, r.texts[0].first, r.texts[0].second, r.texts[0].label) for r in records] == [
        ("train", "train 0", "no", 0.0), ("train", "train 1", "no", 2.5),
        ("test", "validation 0", "no", 0.0), ("test", "validation 1", "no", 2.5),
    ]  # fmt: skip
    assert report.skipped == {"example without a label": 2}
    records, _ = read(source="glue/mnli")
    assert [record.part for record in records] == ["train"] * 2 + ["test"] * 2 + ["mismatched"] * 2
