"""Images with captions in files: JSON lines beside a folder of images, COCO's captions, and VQA's questions.

A line of JSON is ``{"image": "a.jpg", "caption": ...}`` with a caption, a list of captions, or an object with either
for each language, ``{"en": "a dog", "de": ["ein Hund", "Hund"]}``. COCO and VQA are read as their makers publish them
(arXiv 1504.00325, arXiv 1505.00468).
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.examples.files import read_records
from moe_scale.data.images.record import ImageTextReport, Place, Record, Text, cleaned, is_unicode
from moe_scale.errors import ConfigError, Problem

METADATA = ("metadata.jsonl", "metadata.jsonl.gz")
"""What the file in a folder of images is called."""

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"])

_NUMBER = re.compile(r"(\d+)\.\w+$")


def metadata_file(path: Path) -> Path:
    """The file of JSON lines: ``path`` itself, or the one in the folder ``path``; it may be missing."""
    if not path.is_dir():
        return path
    return next((path / name for name in METADATA if (path / name).is_file()), path / METADATA[0])


def captions_of(value: object, language: str, where: str, report: ImageTextReport) -> list[Text]:
    """The captions that a JSON value holds: text, a list, or an object of either for each language."""
    if isinstance(value, dict):
        return [text for code, own in value.items() for text in captions_of(own, str(code), where, report)]
    if not language.strip() or not is_unicode(language):
        report.skip("no language code", where, repr(language))
        return []
    values = value if isinstance(value, list) else [value]
    found = (cleaned(where, one, report) for one in values)
    return [Text(language, text) for text in found if text]


def jsonl_records(
    path: Path, images: Path, part: str, config: ImageTextDataConfig, report: ImageTextReport
) -> Iterator[Record]:
    """The images of a file of JSON lines.

    Raises:
        ConfigError: at the file, when it cannot be read as text.
    """
    for where, line in read_records(metadata_file(path), report):
        lacking = [name for name in (config.image_field, config.caption_field) if name not in line]
        name = line.get(config.image_field)
        if lacking:
            report.skip("missing field", where, ", ".join(lacking))
        elif not _is_name(name):
            report.skip("no name of an image file", where)
        else:
            language = line.get("language") if isinstance(line.get("language"), str) else config.caption_language
            texts = captions_of(line[config.caption_field], str(language), where, report)
            yield Record(where, Place(str(images / str(name))), texts, part)


def _is_name(name: object) -> bool:
    """Whether a file can be called so."""
    return isinstance(name, str) and bool(name) and "\0" not in name and is_unicode(name)


def _is_key(identity: object) -> bool:
    """Whether it can stand for an image or a question: lists and objects cannot."""
    return isinstance(identity, (int, float, str))


def coco_records(
    path: Path, images: Path, part: str, config: ImageTextDataConfig, report: ImageTextReport
) -> Iterator[Record]:
    """The images of a file of COCO's captions.

    Raises:
        ConfigError: at the file, when it is not of that form.
    """
    content = load_json(path, "images", "annotations")
    captions: dict[Any, list[Text]] = collections.defaultdict(list)
    names: dict[Any, str] = {}
    for number, one in enumerate(content["images"], start=1):
        if isinstance(one, dict) and _is_key(one.get("id")) and _is_name(one.get("file_name")):
            names[one["id"]] = one["file_name"]
        else:
            report.skip("no id and name of an image file", f"{path.name}, image {number}")
    for number, annotation in enumerate(content["annotations"], start=1):
        where = f"{path.name}, annotation {number}"
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not _is_key(identity) or identity not in names:
            report.skip("caption of an image that the file does not name", where)
        elif text := cleaned(where, annotation.get("caption"), report):
            captions[identity].append(Text(config.caption_language, text))
    for identity, name in names.items():
        yield Record(f"{path.name}, image {identity}", Place(str(images / name)), captions[identity], part)


def vqa_records(
    path: Path, images: Path, answers: Path, part: str, config: ImageTextDataConfig, report: ImageTextReport
) -> Iterator[Record]:
    """The images of a file of VQA's questions, with the answers of another one.

    Images are known by number: that of the file ``COCO_train2014_000000000009.jpg`` is 9.

    Raises:
        ConfigError: at a file, when it is not of that form; at ``data.images``, when no file there has a number.
    """
    questions = load_json(path, "questions")["questions"]
    given = {
        one["question_id"]: _answers(one)
        for one in load_json(answers, "annotations")["annotations"]
        if isinstance(one, dict) and _is_key(one.get("question_id"))
    }
    numbered = numbered_images(images)
    texts: dict[int, list[Text]] = collections.defaultdict(list)
    for number, one in enumerate(questions, start=1):
        where = f"{path.name}, question {number}"
        if not isinstance(one, dict) or not isinstance(one.get("image_id"), int):
            report.skip("question without the number of an image", where)
        elif not _is_key(one.get("question_id")) or not given.get(one["question_id"]):
            report.skip("question without an answer", where)
        elif one["image_id"] not in numbered:
            report.skip("image file missing", where, f"number {one['image_id']} in {images}")
        elif text := cleaned(where, one.get("question"), report):
            own = given[one["question_id"]]
            texts[one["image_id"]].append(Text(config.caption_language, text, answers=own))
    for identity, own_texts in texts.items():
        yield Record(f"{path.name}, image {identity}", Place(str(numbered[identity])), own_texts, part)


def _answers(annotation: dict[str, Any]) -> tuple[str, ...]:
    """The agreed answer, then each person's; none where the form is another."""
    agreed, people = annotation.get("multiple_choice_answer"), annotation.get("answers") or []
    if not isinstance(people, list):
        return ()
    each = [one.get("answer") if isinstance(one, dict) else one for one in people]
    found = [one for one in (agreed, *(each or [agreed])) if isinstance(one, str) and one and is_unicode(one)]
    return tuple(found) if len(found) == 1 + (len(each) or 1) else ()


def numbered_images(folder: Path) -> dict[int, Path]:
    """The image files of a folder by the number that their names end in.

    Raises:
        ConfigError: at ``data.images``, when there is none, or two have one number.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _NUMBER.search(path.name)
        if match and path.suffix.lower() in IMAGE_SUFFIXES:
            other = found.setdefault(int(match[1]), path)
            if other is not path:
                what = f"{other.name} and {path.name} in {folder} have one number"
                raise ConfigError(Problem("data.images", what, "keep the images of one set in a folder", True))
    if not found:
        what = f"{folder} has no image whose name ends in a number"
        raise ConfigError(Problem("data.images", what, "as COCO_train2014_000000000009.jpg", True))
    return found


def load_json(path: Path, *lists: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: at the file, when it cannot be read, or lacks one of these lists.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(Problem(str(path), f"{path.name} cannot be read as JSON ({why})", "", True)) from error
    lacking = [name for name in lists if not isinstance(found, dict) or not isinstance(found.get(name), list)]
    if lacking:
        has = ", ".join(found) if isinstance(found, dict) else "no object"
        what = f"{path.name} has no list {' or '.join(map(repr, lacking))}"
        raise ConfigError(Problem(str(path), what, f"it has {has}", True))
    assert isinstance(found, dict)
    return found
