"""Images and captions in .tar files, as img2dataset writes LAION (arXiv 2111.02114) and webdataset reads it.

Members with one name but for the suffix belong together: ``000000012.jpg``, ``000000012.txt`` with the caption,
``000000012.json`` with more fields. Only headers and texts are read here, once; where each image begins is kept, so
that any image can be read by itself later. That is why this is tarfile and not webdataset: its streams have no position
that another number of ranks or workers could go on from.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.files import IMAGE_SUFFIXES, captions_of
from moe_scale.data.images.record import ImageTextReport, Place, Record

_LONGEST_TEXT = 2**20  # bytes of a caption's file
_TEXT_SUFFIXES = (".txt", ".json")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def shard_files(path: Path) -> list[Path]:
    """The .tar files of a source, sorted by name; none where there are none."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*.tar") if file.is_file())
    return [path] if path.is_file() else []


def compression(file: Path) -> str | None:
    """What a file is compressed with, by its first bytes; None for one that is not."""
    with open(file, "rb") as opened:
        begin = opened.read(6)
    return next((name for magic, name in _COMPRESSED.items() if begin.startswith(magic)), None)


def shard_records(path: Path, part: str, config: ImageTextDataConfig, report: ImageTextReport) -> Iterator[Record]:
    """The images of a .tar file, or of all in a folder, in their order.

    A file that ends early, or is none, is counted; what was whole before is taken.
    """
    for file in shard_files(path):
        yield from _shard(file, part, config, report)


def _shard(file: Path, part: str, config: ImageTextDataConfig, report: ImageTextReport) -> Iterator[Record]:
    key = ""
    members: dict[str, Any] = {}
    size = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:  # not compressed: or no member could be read by itself
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                own, suffix = _key_of(member.name)
                if own != key:
                    yield from _record(file, key, members, part, config, report)
                    key, members = own, {}
                if suffix in IMAGE_SUFFIXES:
                    members["image"] = Place(str(file), member.offset_data, member.size)
                elif suffix in _TEXT_SUFFIXES and member.size <= _LONGEST_TEXT:
                    content = archive.extractfile(member)
                    assert content is not None, member.name
                    members[suffix] = content.read()
                else:
                    members.setdefault("other", member.name)
    except (OSError, tarfile.TarError) as error:
        report.skip("shard that is damaged from here on", f"{file.name} after {key or 'its begin'!r}", str(error))
        if "image" not in members or not _TEXT_SUFFIXES & members.keys():
            return  # what belongs to the last key may be in the part that is lost
    yield from _record(file, key, members, part, config, report)


def _key_of(name: str) -> tuple[str, str]:
    """What members that belong together share, and the rest: split at the first dot of the file's own name, as
    webdataset does."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, (dot + suffix).lower()


def _record(
    file: Path, key: str, members: dict[str, Any], part: str, config: ImageTextDataConfig, report: ImageTextReport
) -> Iterator[Record]:
    if not members:
        return
    where = f"{file.name}, {key}"
    if "image" not in members:
        report.skip("no image under a name", where, str(members.get("other", "")))
        return
    fields: dict[str, Any] = {}
    if ".json" in members:
        try:
            fields = json.loads(members[".json"])
        except (ValueError, RecursionError):
            report.skip("not JSON", where)
        if not isinstance(fields, dict):
            report.skip("not a JSON object", where)
            fields = {}
    language = fields["language"] if isinstance(fields.get("language"), str) else config.caption_language
    if ".txt" in members:
        # What is no UTF-8 becomes half a surrogate pair, which is counted with the captions that JSON spells so.
        caption: Any = members[".txt"].decode("utf-8", errors="surrogateescape")
    else:
        caption = fields.get(config.caption_field)
    if caption is None:
        report.skip("image without a caption", where)
        return
    yield Record(where, members["image"], captions_of(caption, language, where, report), part)
