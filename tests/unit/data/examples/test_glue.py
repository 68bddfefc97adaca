"""GLUE, with the hub replaced: which fields and splits are taken, and what is said where it cannot be reached."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from moe_scale.data.examples.example import ExampleReport
from moe_scale.data.examples.sources import check_examples, read_source
from moe_scale.errors import ConfigError
from tests.unit.data.examples.conftest import Settings


def test_pairs_of_texts_and_their_splits(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*name: str, split: str) -> list[dict[str, Any]]:
        asked.append((*name, split))
        return [{"premise": f"{split} {n}", "hypothesis": "no", "label": n, "idx": n} for n in range(3)]

    monkeypatch.setattr(datasets, "load_dataset", load)
    report = ExampleReport()
    source = read_source(settings(source="glue/mnli", model_output_size=3), report)
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
    assert [e.texts for e in source.training] == [("train 0", "no"), ("train 1", "no"), ("train 2", "no")]
    assert [e.label for e in source.held_out] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"^model.output_size: 2, and the training examples have labels 0, 1, 2"):
        read_source(settings(source="glue/mnli"), report)


def test_tasks_that_there_are_not(settings: Settings) -> None:
    for name in ("stsb", "", "SST2"):
        (problem,) = check_examples(settings(source=f"glue/{name}"))
        assert problem.where == "data.source"
        assert "glue/sst2" in problem.allowed


def test_a_hub_that_cannot_be_reached(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*name: str, split: str) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match=r"^data.source: cannot load nyu-mll/glue sst2 \(no network\); check the net"):
        read_source(settings(source="glue/sst2"), ExampleReport())
