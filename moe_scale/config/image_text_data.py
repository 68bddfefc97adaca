"""Settings of the data of ``multimodal``: images with captions or questions, and sentences of GLUE."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from moe_scale.config.base import (
    Fraction,
    NonEmptyText,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Strict,
    setting,
)
from moe_scale.errors import Problem

SAMPLE_LANGUAGES, SAMPLE_UNSEEN = ("en", "de", "es", "fr", "it"), ("pt", "ru")
"""Languages of the sample that are trained on, and that are evaluated only, where the settings name none."""

GLUE_CLASSES = {"cola": 2, "sst2": 2, "mrpc": 2, "qqp": 2, "mnli": 3, "qnli": 2, "rte": 2, "wnli": 2, "stsb": 1}
"""Outputs that a GLUE task takes: its classes, or the one score of STS-B."""

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")  # BCP 47 without extensions: en, pt-BR, zh-Hant-TW
_MOST_PIXELS = 89_478_485  # Pillow warns of larger images, and refuses those of twice as many

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class ImageTextDataConfig(Strict):
    """Images and texts: where they are, how they are read, augmented, tokenized, split and batched."""

    source: NonEmptyText = setting(
        "sample",
        "sample (emoji with their names, installed from the package index), glue/TASK (as glue/mrpc, from the Hugging "
        "Face hub), or a path: a .jsonl(.gz) file or a folder with metadata.jsonl, a .tar file or a folder of them, "
        "or a .json file of COCO captions or VQA questions",
    )
    format: Literal["auto", "jsonl", "shards", "coco", "vqa"] = setting(
        "auto",
        "path as a source: jsonl (a record an image), shards (.tar as of img2dataset, KEY.jpg beside KEY.txt or "
        "KEY.json), coco (captions) or vqa (questions); auto tells the first two apart by name",
    )
    images: PathText = setting(
        "", "format jsonl, coco or vqa: folder of the image files; empty means that of data.source"
    )
    answers: PathText = setting("", "format vqa: the .json file with the answers to the questions of data.source")
    heldout: PathText = setting(
        "", "path as a source: another one of that format, for the end of the run; empty takes test_fraction"
    )
    heldout_images: PathText = setting("", "with data.heldout: as data.images")
    heldout_answers: PathText = setting("", "with data.heldout: as data.answers")
    num_answers: Annotated[int, Field(ge=2, le=100_000)] = setting(
        3129, "format vqa: classes, the most frequent answers of training; other questions are counted and left out"
    )
    image_field: NonEmptyText = setting("image", "format jsonl: field with the file's name, relative to data.images")
    caption_field: NonEmptyText = setting(
        "caption",
        "format jsonl or shards' .json: field with the caption, a list of captions, or an object with either for each "
        "language",
    )
    caption_language: str = setting(
        "en", "language of captions that have no code of their own, as they all are in .txt and COCO"
    )
    languages: tuple[str, ...] = setting(
        (),
        "language codes of the captions to train on, as en de; none given means en de es fr it of the sample, and "
        "otherwise all but unseen_languages",
    )
    unseen_languages: tuple[str, ...] = setting(
        (),
        "language codes of captions that are evaluated and never trained on; none given means, for the sample, pt and "
        "ru unless data.languages has them",
    )
    image_size: Annotated[int, Field(ge=8, le=2048)] = setting(64, "height and width that images are brought to")
    mean: Channels = setting((0.5, 0.5, 0.5), "red, green and blue (of 0 to 1) that are taken off each pixel")
    std: Channels = setting((0.5, 0.5, 0.5), "what red, green and blue are divided by after that")
    augment: bool = setting(True, "training images: cropped, mirrored and coloured at random, as the next settings say")
    crop_area: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = setting(
        0.6, "share of the image that a random crop has at least; 1 never crops"
    )
    mirror: Literal["never", "safe", "always"] = setting(
        "safe", "mirror half of the images: never, safe (none whose captions name a side or a script), or of all"
    )
    color: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = setting(
        0.2, "brightness, contrast and saturation are multiplied by 1 - color to 1 + color at random"
    )
    max_pixels: Annotated[int, Field(ge=1, le=_MOST_PIXELS)] = setting(
        50_000_000, "height * width of an image, at most: larger ones are counted and skipped before they are decoded"
    )
    cache_gib: NonNegativeFloat = setting(
        4.0,
        "keep the decoded images in data.cache_dir if they take so many GiB at most; others are decoded whenever they "
        "are needed, and read in long runs of neighbours",
    )
    shuffle_buffer: Annotated[int, Field(ge=1, le=10_000_000)] = setting(
        4096, "images that are not kept decoded: neighbours in the source that are shuffled among themselves"
    )
    tokenizer: Literal["unigram", "bpe"] = setting(
        "unigram", "SentencePiece model, trained on the training texts and kept in the run's folder"
    )
    max_len: Annotated[int, Field(ge=4, le=65_536)] = setting(
        64, "tokens of a text, the first one (CLS) included, at most; longer texts are counted and cut off"
    )
    batch_examples: PositiveInt = setting(
        8, "examples that one unit of the DeepSpeed JSON's micro-batch size stands for"
    )
    num_workers: NonNegativeInt = setting(
        1, "processes of each rank that read, decode and augment training images; 0 does it in the rank itself"
    )
    valid_fraction: Fraction = setting(
        0.05, "share of the images (for GLUE, of the training examples) held out for evaluation during training"
    )
    test_fraction: Fraction = setting(
        0.1, "share held out for the end of the run, where the source has no held-out part of its own"
    )
    cache_dir: NonEmptyText = setting("~/.cache/moe_scale", "folder for prepared data; safe to delete")

    @property
    def is_glue(self) -> bool:
        return self.source.startswith("glue/")

    @property
    def is_path(self) -> bool:
        return self.source != "sample" and not self.is_glue

    @property
    def kind(self) -> Literal["sample", "glue", "jsonl", "shards", "coco", "vqa"]:
        """How the source is read. A path with ``auto`` is taken for JSON lines or for shards by its name: a folder
        is told by its content later, see :func:`moe_scale.data.images.sources.check_image_text`."""
        if not self.is_path:
            return "glue" if self.is_glue else "sample"
        if self.format != "auto":
            return self.format
        return "shards" if self.source.lower().endswith(".tar") else "jsonl"

    @property
    def goal(self) -> Literal["retrieval", "classification", "regression"]:
        """What the labels are: none (texts belong to images), classes, or scores (STS-B)."""
        if self.source == "glue/stsb":
            return "regression"
        return "classification" if self.is_glue or self.kind == "vqa" else "retrieval"

    @property
    def has_images(self) -> bool:
        return not self.is_glue

    @property
    def num_outputs(self) -> int:
        """Width of the head that the labels need: classes, 1 for scores, 0 for retrieval."""
        if self.is_glue:
            return GLUE_CLASSES.get(self.source.removeprefix("glue/"), 0)
        return self.num_answers if self.kind == "vqa" else 0

    @property
    def trained(self) -> tuple[str, ...]:
        """Languages to train on; none means all that are not in :attr:`unseen`."""
        if self.languages or self.source != "sample":
            return self.languages
        return tuple(code for code in SAMPLE_LANGUAGES if code not in self.unseen_languages)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Languages that are evaluated and never trained on."""
        if self.unseen_languages or self.source != "sample":
            return self.unseen_languages
        return tuple(code for code in SAMPLE_UNSEEN if code not in self.languages)

    @property
    def stored_size(self) -> int:
        """Shorter side of the images as they are kept: large enough that no random crop has to be enlarged."""
        return math.ceil(self.image_size / math.sqrt(self.crop_area)) if self.augment else self.image_size

    def problems(self, where: str) -> list[Problem]:
        return [
            Problem(f"{where}.{name}", what, allowed)
            for name, what, allowed in [
                *self._source_problems(where),
                *self._language_problems(),
                *self._split_problems(where),
            ]
        ] + self._pixel_problems(where)

    def _source_problems(self, where: str) -> list[tuple[str, str, str]]:
        found = []
        own = f"with {where}.source = {self.source}"
        if self.is_glue and not self.num_outputs:  # here, as the planner looks at the settings alone
            task, known = self.source.removeprefix("glue/"), ", ".join(f"glue/{name}" for name in GLUE_CLASSES)
            found.append(("source", f"GLUE has no task {task!r}", f"choose one of {known}"))
        if self.is_path and self.format == "auto" and self.source.lower().endswith(".json"):
            found.append(("format", f"auto with {self.source}, which may hold either", "choose coco or vqa"))
        if self.is_path and self.kind == "vqa" and not self.answers:
            found.append(("answers", "the questions have no answers", "name the .json file that has them"))
        if self.heldout and self.kind == "vqa" and not self.heldout_answers:
            what = "the held-out questions have no answers"
            found.append(("heldout_answers", what, "name the .json file that has them"))
        only = {
            "format": (self.is_path, "auto", "a path"),
            "heldout": (self.is_path, "", "a path"),
            "images": (self.kind in ("jsonl", "coco", "vqa"), "", "a .jsonl or .json file"),
            "answers": (self.kind == "vqa", "", "VQA questions"),
            "num_answers": (self.kind == "vqa", 3129, "VQA questions"),
            "image_field": (self.kind == "jsonl", "image", "a .jsonl file"),
            "caption_field": (self.kind in ("jsonl", "shards"), "caption", "a .jsonl file or .tar files"),
            "languages": (self.goal == "retrieval", (), "images with captions"),
            "unseen_languages": (self.goal == "retrieval", (), "images with captions"),
        }
        for name, (used, unset, needs) in only.items():
            if getattr(self, name) != unset and not used:
                found.append((name, f"{_listed(getattr(self, name))} {own}", f"leave it out; it is for {needs}"))
        for name in ("heldout_images", "heldout_answers"):
            if getattr(self, name) and not self.heldout:
                found.append((name, f"{getattr(self, name)} without {where}.heldout", f"set {where}.heldout"))
        return found

    def _language_problems(self) -> list[tuple[str, str, str]]:
        found = []
        for name in ("languages", "unseen_languages"):
            codes = getattr(self, name)
            found += [
                (name, repr(code), "write language codes, as en or pt-BR")
                for code in codes
                if not _LANGUAGE.fullmatch(code)
            ]
            repeated = [code for code, same in itertools.groupby(sorted(codes)) if len(list(same)) > 1]
            found += [(name, f"{code} is named twice", "name it once") for code in repeated]
        if not _LANGUAGE.fullmatch(self.caption_language):
            found.append(("caption_language", repr(self.caption_language), "write a language code, as en or pt-BR"))
        both = sorted(set(self.languages) & set(self.unseen_languages))
        if both:
            what = f"{', '.join(both)}, to be trained on as well"
            found.append(("unseen_languages", what, "name a language in one of the two"))
        return found

    def _split_problems(self, where: str) -> list[tuple[str, str, str]]:
        found = []
        own_test = self.is_glue or bool(self.heldout)
        if not self.valid_fraction:
            found.append(("valid_fraction", "0 leaves nothing to evaluate on", "choose more than 0"))
        if not own_test and not self.test_fraction:
            what = f"0, and {self.source} has no held-out part of its own"
            found.append(("test_fraction", what, f"choose more than 0, or set {where}.heldout"))
        test_fraction = 0.0 if own_test else self.test_fraction
        if self.valid_fraction + test_fraction >= 1:
            both = f"{where}.valid_fraction + {where}.test_fraction = {self.valid_fraction + test_fraction:g}"
            found.append(("test_fraction", f"{both} leaves nothing to train on", "choose less"))
        return found

    def _pixel_problems(self, where: str) -> list[Problem]:
        found = []
        if not all(map(math.isfinite, self.mean)):
            found.append(Problem(f"{where}.mean", _listed(self.mean), "give three finite numbers"))
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            found.append(Problem(f"{where}.std", _listed(self.std), "give three finite numbers above 0"))
        return found


def _listed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
