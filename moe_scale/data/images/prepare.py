"""Images and texts on disk: read, split and tokenized once into flat files that are then read in place.

Layout of ``<cache_dir>/image_text/<fingerprint>/``: the vocabulary; ``images.bin`` with the decoded images, or
``places.bin`` with where they are; for each split what :mod:`moe_scale.data.images.split_files` writes;
``manifest.json``. Nothing here imports torch.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe_scale.config import ImageTextDataConfig
from moe_scale.data import cache
from moe_scale.data.examples.vocabulary import Subwords
from moe_scale.data.images.files import IMAGE_SUFFIXES
from moe_scale.data.images.record import SPLITS, ImageTextReport, Record
from moe_scale.data.images.sources import read_source, source_paths
from moe_scale.data.images.split import COMPARED_AT_MOST, assign_splits, describe_groups, near_groups
from moe_scale.data.images.split_files import ImageTextSplit, write_split
from moe_scale.data.images.store import (
    DistantImages,
    ImageReader,
    KeptImages,
    fits,
    keep_images,
    write_places,
)
from moe_scale.data.subwords import train_model
from moe_scale.errors import ConfigError, Problem

FORMAT = 1
"""Version of the files; a change of it prepares everything anew."""

_NOT_PREPARED = ("cache_dir", "batch_examples", "num_workers", "mean", "std", "augment", "crop_area", "mirror", "color")


@dataclass(frozen=True)
class PreparedImageText:
    """Images and texts on disk, in splits.

    Attributes:
        folder: where the files are.
        config: the settings that they were made with.
        vocabulary: of the texts.
        images: of all splits; None for texts alone.
        languages: codes, the place of each being its number in the files.
        answers: what each class of VQA stands for; empty elsewhere.
        report: what was read, and what was left out.
        fingerprint: equal for equal images and texts in equal order, wherever the files are.
    """

    folder: Path
    config: ImageTextDataConfig
    vocabulary: Subwords
    images: KeptImages | DistantImages | None
    languages: tuple[str, ...]
    answers: tuple[str, ...]
    report: ImageTextReport
    fingerprint: str
    splits: dict[str, ImageTextSplit]

    @classmethod
    def open(cls, folder: Path, config: ImageTextDataConfig) -> PreparedImageText:
        """The data in a folder that :func:`prepare_image_text` made.

        Raises:
            ConfigError: at ``data.cache_dir``, when files are missing or cut off.
        """
        try:
            manifest = json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))
            vocabulary = Subwords.load(folder / Subwords.file_name)
            if vocabulary.fingerprint != manifest["vocabulary"]:
                raise ValueError("the vocabulary is another one")
            images: KeptImages | DistantImages | None = None
            if config.has_images:
                images = KeptImages(folder) if manifest["kept"] else DistantImages(folder, image_reader(config))
            splits = {name: ImageTextSplit(folder, name, vocabulary.vocab_size) for name in SPLITS}
            for name, split in splits.items():
                if len(split) != manifest["report"]["kept"][name]:
                    raise ValueError(f"{name} has {len(split)} items, not {manifest['report']['kept'][name]}")
        except (OSError, ValueError, KeyError, EOFError, ConfigError) as error:
            raise ConfigError(
                Problem(
                    "data.cache_dir",
                    f"the prepared images and texts in {folder} are damaged ({error})",
                    "delete that folder; it is made again from the source",
                    this_host_only=True,
                )
            ) from error
        languages, answers = tuple(manifest["languages"]), tuple(manifest["answers"])
        report = ImageTextReport(**manifest["report"])
        return cls(folder, config, vocabulary, images, languages, answers, report, manifest["content"], splits)

    def split(self, name: str) -> ImageTextSplit:
        """``train``, ``valid``, ``test`` or ``mismatched``."""
        return self.splits[name]


def image_reader(config: ImageTextDataConfig) -> ImageReader:
    return ImageReader(config.source == "sample", config.stored_size, config.max_pixels)


def prepare_image_text(
    config: ImageTextDataConfig,
    vocab_size: int,
    say: Callable[[str], None] | None = None,
    *,
    vocabulary: Path | None = None,
) -> PreparedImageText:
    """Read, split and tokenize the images and texts of ``config``, or open what an earlier call made.

    The result depends on the files (for GLUE, which is taken as it is on the hub at the first call, on its name) and on
    the settings only. Any number of processes may call this at once. The texts of a source are held in memory while it
    is prepared; its images never are.

    Args:
        vocab_size: entries that SentencePiece is trained to: ``model.vocab_size``.
        vocabulary: file of an earlier one, which is taken as it is; None trains one on this source.

    Raises:
        ConfigError: as :func:`moe_scale.data.images.sources.read_source` and ``assign_splits``; when the text does not
            give ``model.vocab_size`` entries; or when ``cache_dir`` cannot be written.
    """
    say = say or (lambda line: None)
    earlier = None if vocabulary is None else Subwords.load(vocabulary)
    name = image_text_fingerprint(config, vocab_size, earlier.fingerprint if earlier else "")
    folder = Path(config.cache_dir).expanduser() / "image_text" / name
    cache.build_once(folder, lambda aside: _build(config, vocab_size, earlier, aside, say), say)
    return PreparedImageText.open(folder, config)


def image_text_fingerprint(config: ImageTextDataConfig, vocab_size: int, vocabulary: str = "") -> str:
    """Name of the folder of the prepared data: 20 hex digits over everything that its content depends on.

    ``vocabulary`` is the fingerprint of one that is given; empty for one that is trained.

    Files that are read whole go in as :func:`moe_scale.data.cache.digest_files` takes them, images in folders (by their
    suffixes) by name, size and time of change.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_PREPARED}
    read, folders = source_paths(config)
    if config.is_path:
        for name in ("source", "heldout", "images", "heldout_images", "answers", "heldout_answers"):
            settings[name] = bool(settings[name])
    versions = [importlib.metadata.version(package) for package in ("sentencepiece", "pillow")]
    digest = hashlib.sha256(f"{FORMAT} {versions} {settings!r} {config.stored_size} {vocab_size}{vocabulary}".encode())
    for path in read:
        cache.digest_files(digest, [path], path.parent)
        if config.is_path:  # places of images are kept as they are now
            digest.update(str(path.resolve()).encode(errors="surrogateescape"))
    for folder in folders:
        digest.update(str(folder.resolve()).encode(errors="surrogateescape"))
        for line in _listing(folder):
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:20]


def _listing(folder: Path) -> Iterator[str]:
    """A line for each image file below ``folder``, in the order of their names."""
    for where, below, names in os.walk(folder):
        below.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                path = Path(where, name)
                about = path.stat() if path.exists() else path.lstat()  # a link may lead nowhere
                yield f"{str(path.relative_to(folder))!r} {about.st_size} {about.st_mtime_ns}\n"


def _build(
    config: ImageTextDataConfig, vocab_size: int, vocabulary: Subwords | None, folder: Path, say: Callable[[str], None]
) -> None:
    """Read everything, decide the split, make the vocabulary, and write each split's files."""
    report = ImageTextReport()
    say(f"reading {config.source}")
    records = read_source(config, report)
    thumbnails_RP = None
    kept = config.has_images and fits(len(records), config.stored_size, config.cache_gib)
    if kept:
        say(f"decoding {len(records):,} images")
        records, thumbnails_RP = keep_images(folder, records, image_reader(config), config.num_workers, report)
    elif config.has_images:
        write_places(folder, records)
    images = {id(record): index for index, record in enumerate(records)}
    groups_R = near_groups(records, thumbnails_RP, by_caption=config.goal == "retrieval")
    report.groups, report.compared = describe_groups(groups_R), _compared(config, kept, len(records))
    splits = assign_splits(records, groups_R, config, report)
    _train_in_trained_languages(config, splits, report)
    answers = _label_answers(config, splits, report) if config.kind == "vqa" else []
    _require_training(config, splits, report)
    languages = sorted({text.language for some in splits.values() for record in some for text in record.texts})
    if vocabulary is None:
        texts = [text for record in splits["train"] for text in record.texts]
        sentences = [one for text in texts for one in (text.first, text.second) if one]
        vocabulary = Subwords(train_model(sentences, kind=config.tokenizer, vocab_size=vocab_size))
    vocabulary.save(folder / Subwords.file_name)
    content = hashlib.sha256(f"{FORMAT} {vocabulary.fingerprint} {languages} {answers}".encode())
    for name, some in splits.items():
        write_split(folder, name, some, images, languages, vocabulary, config, report, content)
    content.update(_digest_of_images(folder, kept) if config.has_images else b"")
    manifest = {
        "format": FORMAT,
        "source": config.source,
        "kept": kept,
        "vocabulary": vocabulary.fingerprint,
        "languages": languages,
        "answers": answers,
        "report": asdict(report),
        "content": content.hexdigest()[:20],
    }
    (folder / cache.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    say(f"prepared {config.source}: {report}")


def _compared(config: ImageTextDataConfig, kept: bool, count: int) -> str:
    """How near copies were looked for, for the report."""
    if not config.has_images:
        return "equal texts"
    texts = "equal captions" if config.goal == "retrieval" else "names"
    if not kept:
        return f"{texts} alone: the images are not kept decoded, and were not compared"
    pixels = "nearly equal pixels" if count <= COMPARED_AT_MOST else "equal pixels alone, as there are so many"
    return f"{texts}, {pixels}"


def _train_in_trained_languages(
    config: ImageTextDataConfig, splits: dict[str, list[Record]], report: ImageTextReport
) -> None:
    """Take the captions in languages that are evaluated only off the training images."""
    unseen = set(config.unseen)
    for record in splits["train"]:
        before = len(record.texts)
        record.texts = [text for text in record.texts if text.language not in unseen]
        report.remove("captions of training images in unseen languages: not trained on", before - len(record.texts))
    splits["train"] = [record for record in splits["train"] if record.texts]


def _label_answers(config: ImageTextDataConfig, splits: dict[str, list[Record]], report: ImageTextReport) -> list[str]:
    """Number the most frequent answers of training; questions of training with others are taken out."""
    counts = collections.Counter(text.answers[0] for record in splits["train"] for text in record.texts)
    answers = [answer for answer, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[: config.num_answers]]
    numbers = {answer: float(number) for number, answer in enumerate(answers)}
    for name, records in splits.items():
        for record in records:
            labelled = [text._replace(label=numbers.get(text.answers[0], float("nan"))) for text in record.texts]
            if name == "train":
                record.texts = [text for text in labelled if text.answers[0] in numbers]
                what = "training questions whose answer is not one of data.num_answers"
                report.remove(what, len(labelled) - len(record.texts))
            else:
                record.texts = labelled
    splits["train"] = [record for record in splits["train"] if record.texts]
    return answers


def _require_training(config: ImageTextDataConfig, splits: dict[str, list[Record]], report: ImageTextReport) -> None:
    if not splits["train"]:
        raise ConfigError(Problem("data.source", f"nothing is left to train on: {report}", "give more records", True))
    if config.is_glue and config.goal == "classification":
        labels = {int(text.label) for records in splits.values() for record in records for text in record.texts}
        if max(labels) >= config.num_outputs:
            what = f"{config.source} has labels {sorted(labels)}, and {config.num_outputs} classes are known"
            raise ConfigError(Problem("data.source", what, "load the task anew", True))


def _digest_of_images(folder: Path, kept: bool) -> bytes:
    """Of the pixels; of images that are not kept, of their places but for the folders."""
    if kept:
        with open(folder / "images.bin", "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(np.load(folder / "places_ranges.npy").tobytes()).digest()
