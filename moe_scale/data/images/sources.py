"""The records of a source, whatever its form. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.examples import glue
from moe_scale.data.examples.files import read_records
from moe_scale.data.examples.sample import Place as PackageFile
from moe_scale.data.examples.sample import installed_file, missing
from moe_scale.data.images import files, sample, shards
from moe_scale.data.images.augment import mirrors_safely
from moe_scale.data.images.record import ImageTextReport, Record, Text, cleaned
from moe_scale.data.report import SkipReport
from moe_scale.errors import ConfigError, Problem, raise_if

ALLOWED = (
    "give a .jsonl (or .jsonl.gz) file, a folder with metadata.jsonl, a .tar file or a folder of them, or a .json file "
    "with data.format coco or vqa"
)


def kind_of(config: ImageTextDataConfig) -> str:
    """How the source is read, its folder looked at: one of .tar files and without metadata.jsonl has shards."""
    path = Path(config.source).expanduser()
    if config.is_path and config.format == "auto" and path.is_dir() and not files.metadata_file(path).is_file():
        return "shards" if shards.shard_files(path) else config.kind
    return config.kind


def check_image_text(config: ImageTextDataConfig) -> list[Problem]:
    """Cheap checks before any process group or memory: of files no more than their first record is read."""
    if config.source == "sample":
        unknown = [code for code in (*config.trained, *config.unseen) if code not in sample.LANGUAGES]
        where = "data.unseen_languages" if set(unknown) & set(config.unseen) else "data.languages"
        has = f"it has {', '.join(sample.LANGUAGES)}"
        found = [Problem(where, f"the sample has no {', '.join(unknown)}", has)] if unknown else []
        return found + missing("data.source", *_package_files(config))
    if config.is_glue:
        # That there is such a task, the settings say already.
        return glue.glue_problems(config.source, scored=True) if config.num_outputs else []
    kind, found = kind_of(config), []
    for name, path, images, answers in _paths(config):
        found += _path_problems(name, path, kind, config)
        if kind in ("jsonl", "coco", "vqa") and not images.is_dir():
            setting = "data.images" if name == "data.source" else "data.heldout_images"
            what = f"{images} is not a folder" if images.exists() else f"{images} does not exist"
            found.append(Problem(setting, what, "name the folder of the image files", True))
        setting = "answers" if name == "data.source" else "heldout_answers"
        if kind == "vqa" and getattr(config, setting):  # that none is named, the settings' own checks say
            found += _readable(f"data.{setting}", answers)
    return found


def source_paths(config: ImageTextDataConfig) -> tuple[list[Path], list[Path]]:
    """The files that a source is read from, and the folders of its images; none for the hub."""
    if config.source == "sample":
        found = (installed_file(place) for place in _package_files(config))
        return [path for path in found if path is not None], []
    if config.is_glue:
        return [], []
    kind, read, folders = kind_of(config), [], []
    for _, path, images, answers in _paths(config):
        if kind == "shards":
            read += shards.shard_files(path)
        else:
            read += [files.metadata_file(path), *([answers] if kind == "vqa" else [])]
            folders.append(images)
    return read, folders


def read_source(config: ImageTextDataConfig, report: ImageTextReport) -> list[Record]:
    """All records of a source in its order; ``report`` counts them, and everything that gives none.

    Lines about one image are one record. Captions in languages that are not asked for are left out.

    Raises:
        ConfigError: what :func:`check_image_text` finds; at a file, when it cannot be read; at ``data.source``, when
            nothing could be read; at ``data.languages``, when no caption is in one of these languages.
    """
    raise_if(check_image_text(config))
    records = [one for one in _joined(_records(config, report)) if one.texts or _without_text(one, report)]
    for record in records:
        report.read[record.part] = report.read.get(record.part, 0) + 1
    if config.goal == "retrieval":
        records = _in_languages(config, records, report)
        for record in records:
            record.mirrors = record.mirrors and mirrors_safely(text.first for text in record.texts)
    if not any(record.part == "train" for record in records):
        why = f"; skipped: {report.skips()}" if report.skipped else ""
        raise ConfigError(Problem("data.source", f"{config.source} has no record that can be used{why}", ALLOWED, True))
    return records


def _without_text(record: Record, report: ImageTextReport) -> bool:
    report.skip("image without a caption", record.where)
    return False


def _package_files(config: ImageTextDataConfig) -> list[PackageFile]:
    known = [code for code in (*config.trained, *config.unseen) if code in sample.LANGUAGES]
    return sample.needed_files(tuple(known))


def _paths(config: ImageTextDataConfig) -> Iterator[tuple[str, Path, Path, Path]]:
    """(setting, file or folder, folder of images, file of answers) of the source and of what is held out."""
    parts = [("data.source", config.source, config.images, config.answers)]
    if config.heldout:
        parts.append(("data.heldout", config.heldout, config.heldout_images, config.heldout_answers))
    for name, source, images, answers in parts:
        path = Path(source).expanduser()
        own = path if path.is_dir() else path.parent
        yield name, path, Path(images).expanduser() if images else own, Path(answers).expanduser()


def _readable(where: str, path: Path) -> list[Problem]:
    if not path.is_file():
        what = f"{path} is not a file" if path.exists() else f"{path} does not exist"
        return [Problem(where, what, ALLOWED if where in ("data.source", "data.heldout") else "", True)]
    if not os.access(path, os.R_OK):
        return [Problem(where, f"{path} cannot be read by this user", "", True)]
    return []


def _path_problems(where: str, path: Path, kind: str, config: ImageTextDataConfig) -> list[Problem]:
    if not path.exists():
        what = f"{str(path)!r} does not exist"
        allowed = f"choose sample, glue/mrpc or a path: {ALLOWED}" if where == "data.source" else ALLOWED
        return [Problem(where, what, allowed, True)]
    if kind == "shards":
        tars = shards.shard_files(path)
        if not tars:
            return [Problem(where, f"{path} has no .tar file", ALLOWED, True)]
        if found := [problem for one in tars for problem in _readable(where, one)]:
            return found
        how = shards.compression(tars[0])
        return [Problem(where, f"{tars[0]} is compressed ({how})", "unpack it to a plain .tar", True)] if how else []
    own = files.metadata_file(path) if kind == "jsonl" else path
    if own != path and not own.is_file():
        return [Problem(where, f"{path} has neither {' nor '.join(files.METADATA)} nor a .tar file", ALLOWED, True)]
    if found := _readable(where, own):
        return found
    if kind != "jsonl":
        return []
    if where == "data.source" and config.format == "auto" and own.name.lower().endswith(".json"):
        return []  # the settings' own checks ask which kind of it this is
    if not own.name.lower().endswith((".jsonl", ".jsonl.gz")):
        return [Problem(where, f"{path} is of no supported kind", ALLOWED, True)]
    return _field_problems(where, own, config)


def _field_problems(where: str, path: Path, config: ImageTextDataConfig) -> list[Problem]:
    """What the first line of a file of JSON lines lacks."""
    try:
        first = next(read_records(path, SkipReport()), None)
    except ConfigError as error:
        return [Problem(where, problem.what, problem.allowed, True) for problem in error.problems]
    if first is None:
        return [Problem(where, f"{path} has no record", "", True)]
    return [
        Problem(f"data.{setting}", f"{path} has no field {name!r}", f"it has {', '.join(first[1]) or 'none'}", True)
        for setting in ("image_field", "caption_field")
        if (name := getattr(config, setting)) not in first[1]
    ]


def _records(config: ImageTextDataConfig, report: ImageTextReport) -> Iterator[Record]:
    if config.source == "sample":
        yield from sample.emoji_records((*config.trained, *config.unseen), report)
    elif config.is_glue:
        yield from _glue_records(config, report)
    else:
        kind = kind_of(config)
        for name, path, images, answers in _paths(config):
            part = "train" if name == "data.source" else "test"
            if kind == "jsonl":
                yield from files.jsonl_records(path, images, part, config, report)
            elif kind == "coco":
                yield from files.coco_records(path, images, part, config, report)
            elif kind == "vqa":
                yield from files.vqa_records(path, images, answers, part, config, report)
            else:
                yield from shards.shard_records(path, part, config, report)


def _glue_records(config: ImageTextDataConfig, report: ImageTextReport) -> Iterator[Record]:
    """A task's examples: those of training, and its public held-out set or, of MNLI, sets."""
    task = config.source.removeprefix(glue.PREFIX)
    parts = {"train": "train", "test": glue.HELDOUT.get(task, "validation")}
    if task == "mnli":
        parts["mismatched"] = "validation_mismatched"
    for part, split in parts.items():
        for where, texts, label in glue.glue_records(config.source, split):
            if isinstance(label, bool) or not isinstance(label, (int, float)) or not label >= 0:
                report.skip("example without a label", where, str(label))
                continue
            own = [cleaned(where, text, report) for text in texts]
            if all(own):
                yield Record(where, None, [Text("en", own[0], "".join(own[1:]), float(label))], part)


def _joined(records: Iterator[Record]) -> list[Record]:
    """Records about one image as one: the texts of the later ones are added to the first."""
    first: dict[object, Record] = {}
    found = []
    for record in records:
        key = (record.place, record.part) if record.place is not None else None
        if key is None or (other := first.setdefault(key, record)) is record:
            found.append(record)
        else:
            other.texts += [text for text in record.texts if text not in other.texts]
            other.mirrors = other.mirrors and record.mirrors
    return found


def _in_languages(config: ImageTextDataConfig, records: list[Record], report: ImageTextReport) -> list[Record]:
    """The records with the captions of the languages that are asked for, those of training first."""
    trained, unseen = config.trained, set(config.unseen)
    present = {text.language for record in records for text in record.texts}
    wanted = (set(trained) or present) | unseen
    for where, codes in (("data.languages", trained), ("data.unseen_languages", config.unseen)):
        lacking = [code for code in codes if code not in present]
        if lacking:
            what = f"{config.source} has no caption in {', '.join(lacking)}"
            raise ConfigError(Problem(where, what, f"it has {', '.join(sorted(present))}", True))
    found = []
    for record in records:
        kept = [text for text in record.texts if text.language in wanted]
        report.remove("captions in languages that are not asked for", len(record.texts) - len(kept))
        record.texts = [text for text in kept if text.language not in unseen]
        record.texts += [text for text in kept if text.language in unseen]
        if record.texts:
            found.append(record)
        else:
            report.remove("images without a caption in the languages that are asked for")
    return found
