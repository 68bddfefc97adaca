"""Labelled examples in a file: a table with names in its first line (.csv, .tsv), or JSON lines (.jsonl, .jsonl.gz)."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from moe_scale.config import ExampleDataConfig
from moe_scale.data.lines import MARK_BYTES, how_to_convert, numbered
from moe_scale.data.report import SkipReport
from moe_scale.errors import ConfigError, Problem

ALLOWED = "give a .csv or .tsv file with the columns' names in its first line, or a .jsonl (or .jsonl.gz) file"
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".jsonl.gz": "jsonl"}

MAX_CHARACTERS = 2**24
"""Of a field of a table. Python's own limit, 131,072, is less than an article."""

Record = dict[str, Any]


def kind_of(path: Path) -> str | None:
    """Which of the kinds of files it is, by its name."""
    return next((kind for suffix, kind in SUFFIXES.items() if path.name.lower().endswith(suffix)), None)


def wanted_fields(config: ExampleDataConfig) -> tuple[str, ...]:
    """The columns or fields that a file has to have."""
    return (*((config.features_field,) if config.features_field else config.text_fields), config.label_field)


def file_problems(where: str, name: str, config: ExampleDataConfig) -> list[Problem]:
    """What is wrong with a file, as far as its first record tells; at the setting ``where``."""

    def problem(what: str, allowed: str = ALLOWED) -> list[Problem]:
        return [Problem(where, what, allowed, this_host_only=True)]

    path = Path(name).expanduser()
    if not path.exists():
        others = "choose sample, glue/sst2, synthetic, synthetic-random-labels, or a path: "
        return problem(f"{name!r} does not exist", (others if where == "data.source" else "") + ALLOWED)
    if not path.is_file() or kind_of(path) is None:
        return problem(f"{name} is of no supported kind")
    if not os.access(path, os.R_OK):
        return problem(f"{name} cannot be read by this user", "")
    if config.features_field and kind_of(path) != "jsonl":
        return problem(f"{name} is a table, which holds no features", "give a .jsonl (or .jsonl.gz) file")
    try:
        first = next(read_records(path, SkipReport()), None)
    except ConfigError as error:
        return [Problem(where, p.what, p.allowed, True) for p in error.problems]
    if first is None:
        return problem(f"{name} has no record")
    lacking = [field for field in wanted_fields(config) if field not in first[1]]
    if lacking:
        has = ", ".join(map(str, first[1])) or "none"
        if len(first[1]) == 1 and ";" in has and kind_of(path) == "csv":
            has = f"its first line is {has!r}, and columns of a .csv are separated by commas"
        else:
            has = f"it has {has}"
        lists = [field for field, value in first[1].items() if isinstance(value, list)]
        if lists and not config.features_field:
            has += f"; for lists of numbers instead of text, as in {lists[0]}, set data.features_field {lists[0]}"
        setting = "data.features_field" if config.features_field else "data.text_fields"
        return [
            Problem(
                "data.label_field" if field == config.label_field else setting,
                f"{name} has no {'field' if kind_of(path) == 'jsonl' else 'column'} {field!r}",
                has,
                this_host_only=True,
            )
            for field in lacking
        ]
    return []


def read_records(path: Path, report: SkipReport) -> Iterator[tuple[str, Record]]:
    """The records of a file, as (where it is, field to value); those that are none are counted.

    Raises:
        ConfigError: at the file, when it cannot be read as text.
    """
    kind = kind_of(path)
    try:
        with _open(path) as file:
            yield from _json_lines(path, file, report) if kind == "jsonl" else _table(path, file, kind, report)
    except UnicodeDecodeError as error:
        what = f"{path.name} is not UTF-8 ({error.reason})"
        raise ConfigError(Problem(str(path), what, how_to_convert(_start(path), path.name), True)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(Problem(str(path), f"{path.name} cannot be read ({error})", "", True)) from error


def _open(path: Path) -> TextIO:
    how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}  # csv wants the ends of lines as they are
    return cast(TextIO, gzip.open(path, "rt", **how)) if path.name.lower().endswith(".gz") else path.open(**how)


def _start(path: Path) -> bytes:
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        return file.read(MARK_BYTES)


def _table(path: Path, file: TextIO, kind: str | None, report: SkipReport) -> Iterator[tuple[str, Record]]:
    # Quotes in tables with tabs are text, as those of GLUE have them.
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {"strict": True}
    csv.field_size_limit(MAX_CHARACTERS)
    rows = csv.reader(file, **how)
    begins = 1  # the line of the next record
    try:
        names = next(rows, [])
        if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
            what = f"{path.name} has several columns {twice[0]!r}"
            raise ConfigError(Problem(str(path), what, "give each a name of its own", True))
        begins = rows.line_num + 1
        for row in rows:
            where, begins = f"{path.name}, line {begins}", rows.line_num + 1
            if not row:
                report.skip("empty line", where)
            elif len(row) != len(names):
                report.skip("wrong number of columns", where, f"{len(row)}, not {len(names)}")
            else:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        what = f"{path.name}, line {begins}: the record that begins there cannot be read ({error})"
        right = f"a field has at most {MAX_CHARACTERS:,} characters"
        right += "" if kind == "tsv" else "; one in quotes is closed by a quote, and those inside of it are doubled"
        raise ConfigError(Problem(str(path), what, right, True)) from error


def _json_lines(path: Path, file: TextIO, report: SkipReport) -> Iterator[tuple[str, Record]]:
    def refuse(why: str) -> NoReturn:
        raise ConfigError(Problem(str(path), f"{path.name}: {why}", "give the whole file", True))

    for number, line in numbered(file, refuse):
        where = f"{path.name}, line {number}"
        if not line.strip():
            report.skip("empty line", where)
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            report.skip("not JSON", where, str(error))
            continue
        if isinstance(record, dict):
            yield where, record
        else:
            report.skip("not a JSON object", where, type(record).__name__)
