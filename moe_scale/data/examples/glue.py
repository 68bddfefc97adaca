"""The classification tasks of GLUE (arXiv 1804.07461) on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from moe_scale.data.hub import load_rows
from moe_scale.errors import Problem

PREFIX, REPOSITORY = "glue/", "nyu-mll/glue"

FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""Task to the fields with its texts. STS-B has scores and no classes."""

SCORED_FIELDS = {"stsb": ("sentence1", "sentence2")}
"""The same for tasks whose labels are scores."""

HELDOUT = dict.fromkeys(FIELDS, "validation") | {"mnli": "validation_matched"}
"""The split that is held out: the labels of the test sets are not public."""


def glue_problems(source: str, *, scored: bool = False) -> list[Problem]:
    """What cannot work about ``data.source``; asks no network.

    Args:
        scored: tasks whose labels are scores are allowed as well.
    """
    task, tasks = source.removeprefix(PREFIX), FIELDS | (SCORED_FIELDS if scored else {})
    if task not in tasks:
        known = ", ".join(PREFIX + name for name in tasks)
        kind = "task" if scored else "classification task"
        return [Problem("data.source", f"GLUE has no {kind} {task!r}", f"choose one of {known}")]
    if importlib.util.find_spec("datasets") is None:
        return [Problem("data.source", f"{source} needs the datasets library", "pip install datasets", True)]
    return []


def glue_records(source: str, split: str) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """The records of a task's split, as (where it is, texts, label).

    Raises:
        ConfigError: at ``data.source``, when the hub cannot be reached and its cache has no copy.
    """
    task = source.removeprefix(PREFIX)
    fields = (FIELDS | SCORED_FIELDS)[task]
    for row, record in enumerate(load_rows(REPOSITORY, task, split), start=1):
        yield f"{source} {split}, row {row}", tuple(record[name] for name in fields), record["label"]
