"""Sentence pairs in files: tables (.tsv), JSON lines (.jsonl, .jsonl.gz), and text files whose lines correspond.

A table has language codes in its first line. A JSON record has a field for each language, ``{"en": ..., "de": ...}``,
or a field ``translation`` with such a record. Parallel text is one file a language, ``books.en`` and ``books.de``.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from moe_scale.config import PairDataConfig
from moe_scale.data.lines import MARK_BYTES, how_to_convert, marked_encoding, numbered
from moe_scale.data.pairs.report import PairReport
from moe_scale.errors import ConfigError, Problem

WHERE = "data.source"
ALLOWED = (
    "give a .tsv file with language codes in its first line, a .jsonl (or .jsonl.gz) file, text files with a language "
    "code as their suffix, as books.en and books.de, or a folder of such files"
)

Texts = dict[str, str | None]
"""Language to sentence; None where a record has something else than text in its place."""

Languages = frozenset[str]

LOST = "file whose rest is lost"
"""Why no more of its records are read; how many there were nobody knows."""

_CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el "
    "en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it "
    "iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt "
    "my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl "
    "sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo "
    "za zh zu"
)
ISO_639_1 = frozenset(_CODES.split())
"""Codes that a suffix or a JSON field is recognised by where ``data.pairs`` names none."""

_LANGUAGE = re.compile(r"[a-z]{2,3}")


@dataclass(frozen=True)
class PairFile:
    """One table, one file of JSON lines, or the text files whose lines correspond.

    Attributes:
        kind: ``tsv``, ``jsonl`` or ``text``.
        name: for messages, relative to the source.
        paths: the file, or those of ``languages`` in their order.
        languages: what it holds; empty for JSON lines, which tell only as they are read.
    """

    kind: str
    name: str
    paths: tuple[Path, ...]
    languages: tuple[str, ...] = ()

    def may_have(self, direction: str) -> bool:
        return not self.languages or set(direction.split("-")) <= set(self.languages)


def find_files(config: PairDataConfig) -> tuple[list[PairFile], list[Path]]:
    """The files of a source, sorted by name, and text files that have no partner; reads the tables' first lines.

    Raises:
        ConfigError: at ``data.source``, with every problem of the path and of the tables' headers.
    """
    path, codes = Path(config.source).expanduser(), languages_of(config) or ISO_639_1
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        candidates = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    elif path.is_file():
        candidates = [path]
        if _kind(path, codes) == "text":
            candidates = sorted(file for file in path.parent.iterdir() if file.is_file() and file.stem == path.stem)
            candidates = [file for file in candidates if _kind(file, codes) == "text"]
    else:
        raise ConfigError(_problem(f"{config.source!r} does not exist", f"choose sample, opus_books, or {ALLOWED}"))
    files, lone, problems = _group(candidates, path if path.is_dir() else path.parent, codes)
    paths = [one for file in files for one in file.paths]
    problems += [_problem(f"{one} cannot be read by this user") for one in paths if not os.access(one, os.R_OK)]
    if problems:
        raise ConfigError(problems)
    if lone and not files:
        others = sorted((languages_of(config) or frozenset()) - {lone[0].suffix[1:]})
        which = f"one of {', '.join(others)}" if others else "the code of another language"
        allowed = f"put {lone[0].stem}.XX beside it, where XX is {which}"
        raise ConfigError(_problem(f"{lone[0]} has no partner", allowed))
    if not files:
        what = "has no file of a supported kind" if path.is_dir() else "is of no supported kind"
        raise ConfigError(_problem(f"{path} {what}", ALLOWED))
    return files, lone


def languages_of(config: PairDataConfig) -> Languages | None:
    """The languages that ``data.pairs`` names, None for no pairs."""
    return frozenset(code for direction in config.pairs for code in direction.split("-")) or None


def read_file(file: PairFile, languages: Languages | None, report: PairReport) -> Iterator[tuple[str, Texts]]:
    """The records of a file, as (where it is, texts); what cannot be read is counted in ``report``.

    Args:
        languages: those wanted, None for all.

    Raises:
        ConfigError: at ``data.source``, for UTF-16 and UTF-32, and for parallel files of unequal numbers of lines.
    """
    try:
        if file.kind == "text":
            yield from _read_text(file, languages, report)
        elif file.kind == "tsv":
            yield from _read_table(file, report)
        else:
            yield from _read_json_lines(file, languages, report)
    except (OSError, EOFError, zlib.error) as error:  # not even its first bytes
        report.skip("file that cannot be read", file.name, str(error))


def require_equal_lines(file: PairFile) -> None:
    """Refuse text files that cannot correspond, as their numbers of lines differ."""
    counts = []
    for path in file.paths:
        with _open(path) as lines:
            counts.append(sum(1 for _ in lines))
    if len(set(counts)) > 1:
        each = ", ".join(f"{path.name} has {count:,}" for path, count in zip(file.paths, counts, strict=True))
        raise ConfigError(_problem(f"{file.name}: lines do not correspond: {each}", "give files of equal length"))


def _group(candidates: list[Path], root: Path, codes: Languages) -> tuple[list[PairFile], list[Path], list[Problem]]:
    files: list[PairFile] = []
    problems: list[Problem] = []
    stems: dict[Path, list[Path]] = {}
    for path in candidates:
        name, kind = str(path.relative_to(root)), _kind(path, codes)
        if kind == "tsv":
            header, problem = _header(path)
            files.append(PairFile("tsv", name, (path,), header))
            problems += [problem] if problem else []
        elif kind == "jsonl":
            files.append(PairFile("jsonl", name, (path,)))
        elif kind == "text":
            stems.setdefault(path.with_suffix(""), []).append(path)
    lone = [paths[0] for paths in stems.values() if len(paths) == 1]
    for stem, paths in stems.items():
        if len(paths) > 1:
            languages = tuple(path.suffix[1:] for path in paths)
            files.append(
                PairFile("text", f"{stem.relative_to(root)}.{{{','.join(languages)}}}", tuple(paths), languages)
            )
    return sorted(files, key=lambda file: file.name), lone, problems


def _kind(path: Path, codes: Languages) -> str | None:
    lower = path.name.lower()
    if lower.endswith(".tsv"):
        return "tsv"
    if lower.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return "text" if path.suffix[1:] in codes else None


def _header(path: Path) -> tuple[tuple[str, ...], Problem | None]:
    """Languages of a table's columns, and what is wrong with them."""
    try:
        with _open(path) as lines:
            columns = tuple(cell.strip() for cell in _decode(next(lines, b""), 1).split("\t"))
    except (OSError, UnicodeDecodeError) as error:
        return (), _problem(f"{path} cannot be read ({error})", "give tables in UTF-8")
    except ConfigError as error:
        return (), error.problems[0]
    unknown = [column for column in columns if not _LANGUAGE.fullmatch(column)]
    if len(columns) < 2 or unknown or len(set(columns)) < len(columns):
        shown = "\t".join(columns)[:60]
        allowed = "the first line names the language of each of two or more columns, separated by tabs, as en\\tde"
        return (), _problem(f"{path} begins with the line {shown!r}", allowed)
    return columns, None


def _read_table(file: PairFile, report: PairReport) -> Iterator[tuple[str, Texts]]:
    with _open(file.paths[0]) as lines:
        for number, line in numbered(lines, partial(report.skip, LOST, file.name)):
            where = f"{file.name}, line {number}"
            if number == 1:
                continue
            text = _decoded(line, number, where, report)
            if text is None:
                continue
            cells = text.split("\t")
            if not text.strip():
                report.skip("empty line", where)
            elif len(cells) != len(file.languages):
                report.skip("wrong number of columns", where, f"{len(cells)}, not {len(file.languages)}")
            else:
                yield where, dict(zip(file.languages, cells, strict=True))


def _read_text(file: PairFile, languages: Languages | None, report: PairReport) -> Iterator[tuple[str, Texts]]:
    used = [k for k, language in enumerate(file.languages) if languages is None or language in languages]
    opened: list[IO[bytes]] = []
    try:
        opened += [_open(file.paths[k]) for k in used]
        for number, lines in enumerate(zip(*opened, strict=True), start=1):
            texts: Texts = {}
            for k, line in zip(used, lines, strict=True):
                text = _decoded(line, number, f"{file.paths[k].name}, line {number}", report)
                if text is not None:
                    texts[file.languages[k]] = text
            if len(texts) == len(used) or len(texts) > 1:  # the others are counted already
                yield f"{file.name}, line {number}", texts
    finally:
        for one in opened:
            one.close()


def _read_json_lines(file: PairFile, languages: Languages | None, report: PairReport) -> Iterator[tuple[str, Texts]]:
    with _open(file.paths[0]) as lines:
        for number, line in numbered(lines, partial(report.skip, LOST, file.name)):
            where = f"{file.name}, line {number}"
            text = _decoded(line, number, where, report)
            if text is None:
                continue
            if not text.strip():
                report.skip("empty line", where)
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                report.skip("not JSON", where, str(error))
                continue
            if isinstance(record, dict) and "translation" in record:
                record, fields = record["translation"], ISO_639_1
            else:
                fields = ISO_639_1 - {"id"}  # more often a number than Indonesian
            if isinstance(record, dict):
                yield where, _texts(record, languages, fields)
            else:
                report.skip("not a JSON object", where, type(record).__name__)


def _texts(record: dict[str, Any], languages: Languages | None, fields: Languages) -> Texts:
    """The texts of the languages that are wanted, or, with None, of all ``fields`` that have text."""
    if languages is None:
        return {key: value for key, value in record.items() if key in fields and isinstance(value, str)}
    return {key: value if isinstance(value, str) else None for key, value in record.items() if key in languages}


def _open(path: Path) -> IO[bytes]:
    """The lines of a file as bytes; refuses UTF-16 and UTF-32, of which no line could be read."""
    opened = cast(IO[bytes], gzip.open(path)) if path.name.lower().endswith(".gz") else path.open("rb")  # noqa: SIM115
    try:
        start = opened.read(MARK_BYTES)
        opened.seek(0)
    except BaseException:
        opened.close()
        raise
    if marked_encoding(start):
        opened.close()
        raise ConfigError(_problem(f"{path} is not UTF-8", how_to_convert(start, path.name)))
    return opened


def _decode(line: bytes, number: int) -> str:
    """One line without its end; the first may begin with a byte order mark."""
    return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def _decoded(line: bytes, number: int, where: str, report: PairReport) -> str | None:
    try:
        return _decode(line, number)
    except UnicodeDecodeError as error:
        report.skip("not UTF-8", where, f"byte {error.start} of the line")
        return None


def _problem(what: str, allowed: str = "") -> Problem:
    return Problem(WHERE, what, allowed, this_host_only=True)
