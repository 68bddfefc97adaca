"""Labelled examples of a source, for training and held out.

A record that gives no example is counted and described in an :class:`ExampleReport`; labels that cannot be are refused,
as they mean that the wrong column was named. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_scale.config import ClassifierConfig, ExampleDataConfig
from moe_scale.config.classifier import RANDOM_LABELS
from moe_scale.data.examples import files, glue, sample
from moe_scale.data.examples.example import Example, ExampleReport, cleaned
from moe_scale.data.examples.synthetic import synthetic_examples
from moe_scale.errors import ConfigError, Problem, raise_if

TRAINING, HELD_OUT = "training", "held-out"
"""Names of the two parts in a report."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")


class Source(NamedTuple):
    """The examples of a source.

    Attributes:
        training: to train on, and to evaluate on during training.
        held_out: for the end of the run; empty where the source has none of its own.
    """

    training: list[Example]
    held_out: list[Example]


def check_examples(config: ClassifierConfig) -> list[Problem]:
    """Cheap checks before any process group or memory: of files no more than their first record is read."""
    data, found = config.data, []
    if data.source == "sample":
        found += sample.missing("data.source", sample.REVIEWS, sample.RATINGS)
    elif data.source.startswith(glue.PREFIX):
        found += glue.glue_problems(data.source)
    elif data.is_path:
        found += files.file_problems("data.source", data.source, data)
        found += files.file_problems("data.heldout", data.heldout, data) if data.heldout else []
    if not data.has_features:
        needed = [sample.VOCABULARY] if data.tokenizer == "encoder" else []
        needed += [sample.WEIGHTS] if config.model.embeddings == "encoder" else []
        found += sample.missing("data.tokenizer", *needed)
    return found


def source_paths(config: ExampleDataConfig) -> list[Path]:
    """The files that a source consists of; none for the hub and what is made here."""
    if config.source == "sample":
        found = (sample.installed_file(place) for place in (sample.REVIEWS, sample.RATINGS))
        return [path for path in found if path is not None]
    if config.is_path:
        return [Path(name).expanduser() for name in (config.source, config.heldout) if name]
    return []


def read_source(config: ClassifierConfig, report: ExampleReport) -> Source:
    """All examples of a source in its order, texts cleaned; ``report`` counts them, and every record that gives none.

    Raises:
        ConfigError: what :func:`check_examples` finds; at ``data.label_field``, for labels that are no whole numbers
            from 0; at ``model.output_size``, for more classes than it has, and for a single one; at ``data.source``,
            when nothing could be read.
    """
    raise_if(check_examples(config))
    data, model = config.data, config.model
    if data.is_synthetic:
        random_labels = data.source == RANDOM_LABELS
        made = synthetic_examples(
            data, input_size=model.input_size, num_classes=model.output_size, random_labels=random_labels
        )
        source = Source(list(made), [])
    else:
        labels = _Labels()
        source = Source(*(list(_examples(config, part, labels, report)) for part in (TRAINING, HELD_OUT)))
        labels.require_whole()
    report.read = {TRAINING: len(source.training)}
    if source.held_out or _has_held_out(data):
        report.read[HELD_OUT] = len(source.held_out)
    _require_examples(config, source, report)
    _require_classes(source, model.output_size)
    return source


class _Labels:
    """Reads labels, and remembers those that cannot be."""

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.num_bad = 0

    def read(self, where: str, value: object) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if isinstance(value, str) and _WHOLE.fullmatch(value.strip()) and int(value) >= 0:
            return int(value)
        self.num_bad += 1
        if len(self.bad) < 3:
            self.bad.append(f"{where}: {str(value)[:40]!r}")
        return None

    def require_whole(self) -> None:
        if self.num_bad:
            more = ", ..." if self.num_bad > len(self.bad) else ""
            what = f"{self.num_bad:,} labels are no whole numbers from 0 [{'; '.join(self.bad)}{more}]"
            instead = "name the column of the classes, numbered from 0"
            raise ConfigError(Problem("data.label_field", what, instead, this_host_only=True))


def _has_held_out(data: ExampleDataConfig) -> bool:
    return not data.is_synthetic and not (data.is_path and not data.heldout)


def _examples(config: ClassifierConfig, part: str, labels: _Labels, report: ExampleReport) -> Iterator[Example]:
    """The examples of one part of a source of texts or of files."""
    data = config.data
    for where, texts, value in _records(data, part, report):
        label = labels.read(where, value)
        if label is None:
            continue
        if data.features_field:
            found = _features(where, texts[0], config.model.input_size, label, report)
        else:
            found = cleaned(where, texts, label, report, as_is=data.text_form == "as_is")
        if found is not None:
            yield found


def _records(data: ExampleDataConfig, part: str, report: ExampleReport) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """The records of one part, as (where it is, texts or features, label)."""
    if data.source == "sample":
        records = sample.review_records() if part == TRAINING else sample.rating_records(report)
        yield from ((where, (text,), label) for where, text, label in records)
    elif data.source.startswith(glue.PREFIX):
        split = "train" if part == TRAINING else glue.HELDOUT[data.source.removeprefix(glue.PREFIX)]
        yield from glue.glue_records(data.source, split)
    elif name := (data.source if part == TRAINING else data.heldout):
        *inputs, label_field = files.wanted_fields(data)
        for where, record in files.read_records(Path(name).expanduser(), report):
            lacking = [field for field in (*inputs, label_field) if field not in record]
            if lacking:
                report.skip("missing field", where, ", ".join(lacking))
            else:
                yield where, tuple(record[field] for field in inputs), record[label_field]


def _features(where: str, value: object, width: int, label: int, report: ExampleReport) -> Example | None:
    """The example of a list of positions; None, and counted, where it is no such list or has a number that is none."""
    try:
        with np.errstate(over="ignore"):  # what is beyond fp32 becomes infinite
            features_SI = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        lists = isinstance(value, list) and all(isinstance(position, list) for position in value)
        widths = sorted({len(position) for position in value}) if isinstance(value, list) and lists else []
        if len(widths) > 1:
            report.skip("features of unequal width", where, f"{widths[0]} to {widths[-1]} numbers a position")
        else:
            report.skip("features that are no list of lists of numbers", where)
        return None
    if features_SI.ndim != 2 or not len(features_SI):
        report.skip("features that are no list of lists of numbers", where)
    elif features_SI.shape[1] != width:
        report.skip("features of another width than model.input_size", where, f"{features_SI.shape[1]}, not {width}")
    elif not (finite_SI := np.isfinite(features_SI)).all():
        position, number = np.argwhere(~finite_SI)[0]
        what = f"{features_SI[position, number]}, number {number + 1} of position {position + 1}"
        report.skip("features that are not finite numbers", where, what)
    else:
        return Example(where, (), features_SI, label)
    return None


def _require_examples(config: ClassifierConfig, source: Source, report: ExampleReport) -> None:
    """Refuse a source of which nothing is left, and say what became of its records."""
    why = f"; skipped: {report.skips()}" if report.skipped else ""
    data = config.data
    empty = []
    if not source.training:
        empty.append(("data.source", data.source))
    if not source.held_out and _has_held_out(data):
        empty.append(("data.heldout", data.heldout or data.source))
    what = f"no example that can be used{why}"
    right = files.ALLOWED
    if data.features_field:
        width = config.model.input_size
        right = f"{data.features_field} is to be a list of positions, each a list of model.input_size = {width} numbers"
    raise_if([Problem(where, f"{name} has {what}", right, this_host_only=True) for where, name in empty])


def _require_classes(source: Source, num_classes: int) -> None:
    """Refuse labels beyond the classes, and a single class."""
    for name, examples in (("training", source.training), ("held-out", source.held_out)):
        found = sorted({example.label for example in examples})
        if found and found[-1] >= num_classes:
            what = f"{num_classes}, and the {name} examples have labels {_listed(found)}"
            raise ConfigError(Problem("model.output_size", what, f"choose {found[-1] + 1}", True))
        if name == "training" and len(found) == 1:
            what = f"all {len(examples):,} training examples are of class {found[0]}"
            raise ConfigError(Problem("data.source", what, "give examples of two classes at least", True))


def _listed(numbers: Iterable[int]) -> str:
    every = list(map(str, numbers))
    return ", ".join(every if len(every) < 10 else [*every[:8], "...", every[-1]])
