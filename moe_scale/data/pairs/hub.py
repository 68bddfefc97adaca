"""``Helsinki-NLP/opus_books`` on the Hugging Face hub: 64 pairs of 16 languages, from books out of copyright."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from moe_scale.data.hub import load_rows
from moe_scale.errors import Problem

OPUS_BOOKS = "opus_books"
OPUS_BOOKS_NAME = "Helsinki-NLP/opus_books"

# Second language to the first ones, in alphabetical order, as in the names of the data set's configurations.
_PARTNERS = {
    "de": "ca",
    "en": "ca de el",
    "eo": "de en",
    "es": "de el en eo",
    "fi": "en es",
    "fr": "de el en eo es fi",
    "hu": "ca de el en eo es fi fr",
    "it": "de en eo es fr hu",
    "nl": "ca de en es fr hu it",
    "no": "en es fi fr hu",
    "pl": "en fi fr hu",
    "pt": "de en eo es fr hu it",
    "ru": "de en es fr hu it",
    "sv": "en fr it",
}

OPUS_BOOKS_PAIRS = tuple(
    sorted(f"{first}-{second}" for second, firsts in _PARTNERS.items() for first in firsts.split())
)
"""The configurations of the data set."""

OPUS_BOOKS_LANGUAGES = tuple(sorted({code for pair in OPUS_BOOKS_PAIRS for code in pair.split("-")}))


def opus_books_problems(directions: tuple[str, ...]) -> list[Problem]:
    """What cannot work about these directions; asks no network."""
    if importlib.util.find_spec("datasets") is None:
        return [Problem("data.source", f"{OPUS_BOOKS} needs the datasets library", "pip install datasets", True)]
    if not directions:
        return [
            Problem(
                "data.pairs",
                f"none given, and {OPUS_BOOKS} has {len(OPUS_BOOKS_PAIRS)} pairs of languages",
                f"choose among {', '.join(OPUS_BOOKS_PAIRS)}, each in either direction",
            )
        ]
    return [problem for direction in directions if (problem := _direction_problem(direction))]


def _direction_problem(direction: str) -> Problem | None:
    if configuration(direction) in OPUS_BOOKS_PAIRS:
        return None
    codes = direction.split("-")
    unknown = [code for code in codes if code not in OPUS_BOOKS_LANGUAGES]
    if unknown:
        what = f"{direction}: {OPUS_BOOKS} has no language {' and no '.join(unknown)}"
        return Problem("data.pairs", what, f"choose from {', '.join(OPUS_BOOKS_LANGUAGES)}")
    source = codes[0]
    partners = sorted({code for pair in OPUS_BOOKS_PAIRS if source in (both := pair.split("-")) for code in both})
    partners.remove(source)
    return Problem("data.pairs", f"{OPUS_BOOKS} has no {direction}", f"it has {source} with {', '.join(partners)}")


def configuration(direction: str) -> str:
    """Name of the configuration that has a direction."""
    return "-".join(sorted(direction.split("-")))


def opus_books_records(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of one configuration, as (where it is, language to text).

    Raises:
        ConfigError: at ``data.source``, when the hub cannot be reached and its cache has no copy.
    """
    for row, record in enumerate(load_rows(OPUS_BOOKS_NAME, name, "train"), start=1):
        yield f"{OPUS_BOOKS} {name}, row {row}", record["translation"]
