"""Settings and examples that several modules look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_scale.config import ClassifierConfig, ClassifierModelConfig, ExampleDataConfig

Settings = Callable[..., ClassifierConfig]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Makes settings from those of the data; the model's begin with ``model_``."""

    def make(**given: Any) -> ClassifierConfig:
        model = {"vocab_size": 300} | {
            name.removeprefix("model_"): value for name, value in given.items() if name.startswith("model_")
        }
        data = {name: value for name, value in given.items() if not name.startswith("model_")}
        return ClassifierConfig(
            model=ClassifierModelConfig(**model),
            data=ExampleDataConfig(**{"cache_dir": str(tmp_path / "cache"), "tokenizer": "bpe", **data}),
        )

    return make


def write_json_lines(path: Path, records: list[Any]) -> str:
    """A file of JSON lines; returns its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def some_texts(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Distinct texts of two classes."""
    moods = ["dull and slow", "bright and quick"]
    return [
        {"text": f"Film {n} is {moods[n % 2]}, they say: {n * n}!", "label": n % 2} for n in range(first, first + count)
    ]
