"""Sentence pairs as an iterator: the installed sample, ``opus_books`` from the Hugging Face hub, or local files.

A record that gives no pair is counted and described in a :class:`PairReport`; one bad line out of a million ends no
run. A source or a direction that is not there at all is a :class:`ConfigError`, found by :func:`check_pair_source`
before anything expensive starts where a quick look can tell. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from moe_scale.config import PairDataConfig
from moe_scale.config.translation import is_direction
from moe_scale.data.pairs import files, hub, sample
from moe_scale.data.pairs.hub import OPUS_BOOKS, OPUS_BOOKS_PAIRS
from moe_scale.data.pairs.report import Pair, PairReport
from moe_scale.data.pairs.sample import SAMPLE_LANGUAGES
from moe_scale.data.pairs.sentences import clean
from moe_scale.errors import ConfigError, Problem, raise_if

__all__ = [
    "OPUS_BOOKS",
    "OPUS_BOOKS_PAIRS",
    "SAMPLE",
    "SAMPLE_LANGUAGES",
    "Pair",
    "PairReport",
    "check_pair_source",
    "named_directions",
    "read_pairs",
    "source_paths",
]

SAMPLE = "sample"


def check_pair_source(config: PairDataConfig) -> list[Problem]:
    """Cheap checks before any process group or memory: of files no more than their first lines is read.

    Returns:
        Every problem found, at ``data.source`` or ``data.pairs``; those of files are marked as this host's.
    """
    # Names that are none are told of by the settings: what they would give here is no news.
    pairs = tuple(filter(is_direction, config.pairs))
    if config.source == SAMPLE:
        return _sample_problems(pairs)
    if config.source == OPUS_BOOKS:
        return hub.opus_books_problems(pairs) if pairs or not config.pairs else []
    config = replace(config, pairs=pairs)
    try:
        found, _ = files.find_files(config)
    except ConfigError as error:
        return error.problems
    if not any(path.stat().st_size for file in found for path in file.paths):
        return [Problem("data.source", f"{config.source} has only empty files", files.ALLOWED, True)]
    has = sorted({f"{a}-{b}" for file in found for a, b in itertools.permutations(file.languages, 2)})
    return [
        Problem("data.pairs", f"{config.source} has no {direction}", f"it has {', '.join(has)}", True)
        for direction in config.pairs
        if not any(file.may_have(direction) for file in found)
    ]


def read_pairs(config: PairDataConfig, report: PairReport) -> Iterator[Pair]:
    """The pairs of a source in its order, texts cleaned; ``report`` counts them, and every record that gives none.

    With no ``pairs`` named, files give every two languages of a record, both ways, and the sample English into its
    15 other languages. A record counts as skipped where it has no pair for any direction.

    Raises:
        ConfigError: what :func:`check_pair_source` finds; at ``data.pairs``, when a direction has no pair at all; at
            ``data.source``, when nothing could be read, with the first reasons.
    """
    raise_if(check_pair_source(config))
    if config.source == SAMPLE:
        yield from _sample_pairs(named_directions(config), report)
    elif config.source == OPUS_BOOKS:
        for name in dict.fromkeys(map(hub.configuration, config.pairs)):
            here = tuple(d for d in config.pairs if hub.configuration(d) == name)
            for where, texts in hub.opus_books_records(name):
                yield from _pairs(where, texts, here, report)
    else:
        yield from _file_pairs(config, report)
    _require_pairs(config, report)


def named_directions(config: PairDataConfig) -> tuple[str, ...]:
    """``data.pairs``, or the sample's default; empty where only reading the files tells."""
    if config.source == SAMPLE and not config.pairs:
        return tuple(f"{sample.ENGLISH}-{code}" for code in SAMPLE_LANGUAGES if code != sample.ENGLISH)
    return config.pairs


def source_paths(config: PairDataConfig) -> tuple[list[Path], Path | None]:
    """The files that a source consists of, and the folder to name them relative to; none for the hub."""
    if config.source == OPUS_BOOKS:
        return [], None
    if config.source == SAMPLE:
        paths = list(sample.catalogue_files().values())
        return paths, paths[0].parents[2] if paths else None
    found, lone = files.find_files(config)
    path = Path(config.source).expanduser()
    root = path if path.is_dir() else path.parent
    return sorted([*(path for file in found for path in file.paths), *lone]), root


def _sample_problems(directions: tuple[str, ...]) -> list[Problem]:
    problems = [problem] if (problem := sample.sample_problem()) else []
    for direction in directions:
        unknown = [code for code in direction.split("-") if code not in SAMPLE_LANGUAGES]
        if unknown:
            what = f"{direction}: the sample has no language {' and no '.join(unknown)}"
            problems.append(Problem("data.pairs", what, f"choose from {', '.join(SAMPLE_LANGUAGES)}"))
    return problems


def _sample_pairs(directions: tuple[str, ...], report: PairReport) -> Iterator[Pair]:
    languages = sorted({code for direction in directions for code in direction.split("-")})
    for where, texts in sample.sample_records(languages):
        yield from _pairs(where, texts, directions, report)


def _file_pairs(config: PairDataConfig, report: PairReport) -> Iterator[Pair]:
    found, lone = files.find_files(config)
    for path in lone:
        report.skip("text file without a partner", path.name)
    used = [file for file in found if not config.pairs or any(map(file.may_have, config.pairs))]
    for file in found:
        if file not in used:
            report.skip("file without a direction of data.pairs", file.name, ", ".join(file.languages))
    for file in used:
        if file.kind == "text":
            files.require_equal_lines(file)
    for file in used:
        for where, texts in files.read_file(file, files.languages_of(config), report):
            directions = config.pairs or (f"{a}-{b}" for a, b in itertools.permutations(texts, 2))
            yield from _pairs(where, texts, directions, report)


def _pairs(
    where: str, texts: Mapping[str, str | None], directions: Iterable[str], report: PairReport
) -> Iterator[Pair]:
    """The pairs of one record, and a count of what it lacks."""
    there = False
    for direction in directions:
        source_language, target_language = direction.split("-")
        if source_language not in texts or target_language not in texts:
            continue
        there = True
        source, target = texts[source_language], texts[target_language]
        if source is None or target is None:
            report.skip("not text", where, source_language if source is None else target_language)
            continue
        try:
            pair = Pair(direction, clean(source), clean(target))
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no UTF-8 can
            report.skip("not valid Unicode", where)
            continue
        if not pair.source or not pair.target:
            sides = [side for side, text in (("source", pair.source), ("target", pair.target)) if not text]
            report.skip(f"empty {' and '.join(sides)}", where, direction)
            continue
        report.count(direction)
        yield pair
    if not there:
        report.skip("missing field", where, f"only {', '.join(texts) or 'other fields'}")


def _require_pairs(config: PairDataConfig, report: PairReport) -> None:
    reasons = f"; skipped: {report.skips()}" if report.skipped else ""
    if not report.read:
        raise ConfigError(
            Problem(
                "data.source", f"{config.source} has no sentence pair that can be used{reasons}", files.ALLOWED, True
            )
        )
    raise_if(
        [
            Problem("data.pairs", f"{config.source} has no {d}{reasons}", f"it has {', '.join(report.read)}", True)
            for d in config.pairs
            if d not in report.read
        ]
    )
