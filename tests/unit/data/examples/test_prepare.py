"""Splits that share nothing, what is left out of them, and the files that they are kept in."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_scale.config import ClassifierConfig
from moe_scale.data.examples.example import Example, ExampleReport
from moe_scale.data.examples.prepare import examples_fingerprint, prepare_examples, split_examples
from moe_scale.data.examples.sources import Source
from moe_scale.errors import ConfigError
from tests.unit.data.examples.conftest import Settings, some_texts, write_json_lines


def text(content: str, label: int = 0) -> Example:
    return Example(content, (content,), None, label)


def split(config: ClassifierConfig, source: Source) -> tuple[dict[str, list[str]], ExampleReport]:
    report = ExampleReport()
    found = split_examples(config, source, report)
    return {name: [e.where for e in examples] for name, examples in found.items()}, report


MANY = [text(f"film {n}", n % 2) for n in range(100)]


def test_shares(settings: Settings) -> None:
    config = settings(source="some.csv", valid_fraction=0.1, test_fraction=0.25)
    splits, _ = split(config, Source(MANY, []))
    assert {name: len(found) for name, found in splits.items()} == {"train": 65, "valid": 10, "test": 25}
    assert sorted(itertools.chain(*splits.values())) == sorted(e.where for e in MANY)
    backwards, _ = split(config, Source(MANY[::-1], []))
    assert backwards["test"] == splits["test"], "the order of the source decides nothing"
    assert backwards["train"] == splits["train"][::-1], "but that of training"
    splits, _ = split(replace(config, data=replace(config.data, heldout="b.csv")), Source(MANY[:50], MANY[50:]))
    assert {name: len(found) for name, found in splits.items()} == {"train": 45, "valid": 5, "test": 50}


def test_copies(settings: Settings) -> None:
    copies = [text("FILM 1!", 1), text("Film 2", 1), text("film 3", 1), text("odd", 0), text("Odd.", 1), text("odd", 0)]
    splits, report = split(settings(source="some.csv"), Source(MANY + copies, []))
    assert report.removed == {
        "training whose copies have other labels": 2 + 3,  # film 2 of MANY has the label 0
        "repeated among those training: kept once": 2,
    }
    every = list(itertools.chain(*splits.values()))
    assert len(every) == 99
    assert not {"film 2", "Film 2", "odd", "FILM 1!"} & set(every)


def test_what_is_in_both_parts(settings: Settings) -> None:
    held = [text("Film 0."), text("Film 1", 1), text("new", 1), text("newer")]
    for source, left_out in (("some.csv", "train"), ("sample", "test")):
        config = settings(source=source, heldout="" if source == "sample" else "b.csv")
        splits, report = split(config, Source(MANY, held))
        assert sum(report.removed.values()) == 2
        trained = {text(t).key for name in ("train", "valid") for t in splits[name]}
        assert not trained & {text(t).key for t in splits["test"]}
        assert sorted(splits["test"]) == (
            ["Film 0.", "Film 1", "new", "newer"] if left_out == "train" else ["new", "newer"]
        )
        assert len(trained) == (98 if left_out == "train" else 100)


def test_nothing_left(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"^data.source: no example is left in the train split"):
        split(settings(source="some.csv", heldout="b.csv"), Source(MANY[:4], MANY))
    one_class = [text("a", 1), *(text(f"b {n}") for n in range(9))]
    with pytest.raises(ConfigError, match=r"left to train on are of class 0: "):
        split(settings(source="some.csv", heldout="b.csv"), Source(one_class, [text("a", 1)]))


@pytest.mark.parametrize("tokenizer", ["unigram", "bpe", "encoder"])
def test_texts_on_disk(settings: Settings, tmp_path: Path, tokenizer: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(200))
    size = 30_522 if tokenizer == "encoder" else 300
    config = settings(source=path, tokenizer=tokenizer, max_len=15, model_vocab_size=size)
    said: list[str] = []
    found = prepare_examples(config, said.append)
    again = prepare_examples(config, lambda line: pytest.fail(line))
    assert again.fingerprint == found.fingerprint
    assert found.vocabulary is not None
    train = found.split("train")
    assert train.lengths_M.max() <= 15
    assert train.text(0).startswith("film ")
    for number in range(5):
        (ids,) = found.vocabulary.encode_batch([train.text(number)])
        assert train.inputs(number).tolist() == ids[:15]
        assert train.labels_M[number] == int(train.text(number).split()[1]) % 2
    assert sum(found.report.cut.values()) == sum(
        len(ids) > 15 for s in found.splits.values() for ids in found.vocabulary.encode_batch(s.texts())
    )
    assert "200 training examples read; 160 train, 20 valid, 20 test" in said[-1]


def test_several_texts_have_a_separator_between_them(settings: Settings, tmp_path: Path) -> None:
    records = [{"a": t["text"], "b": "yes", "label": t["label"]} for t in some_texts(50)]
    config = settings(source=write_json_lines(tmp_path / "a.jsonl", records), text_fields=("a", "b"))
    found = prepare_examples(config)
    assert found.vocabulary is not None
    shown = found.split("train").text(0)
    first, second = found.vocabulary.encode_batch(shown.split(" | "))
    assert found.split("train").inputs(0).tolist() == [*first, found.vocabulary.separator_id, *second]


def test_features_on_disk(settings: Settings) -> None:
    config = settings(source="synthetic", synthetic_examples=50, max_len=8, model_input_size=5)
    found = prepare_examples(config)
    assert found.vocabulary is None
    split = found.split("test")
    assert split.inputs(0).shape == (split.lengths_M[0], 5)
    assert split.inputs(0).dtype == np.float32
    assert split.text(0) == ""
    np.testing.assert_allclose(split.mean_features()[1], split.inputs(1).mean(axis=0))
    assert {name: len(s) for name, s in found.splits.items()} == {"train": 40, "valid": 5, "test": 5}


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ({}, False),
        ({"cache_dir": "elsewhere", "batch_examples": 3}, False),
        ({"max_len": 9}, True),
        ({"label_field": "other"}, True),
        ({"model_vocab_size": 400}, True),
        ({"model_output_size": 3}, True),
        ({"model_input_size": 64}, False),  # of text it is a matter of the model
        ({"model_hidden_size": 64}, False),
    ],
)
def test_what_another_preparation_takes(
    change: dict[str, Any], another: bool, settings: Settings, tmp_path: Path
) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(5))
    first = examples_fingerprint(settings(source=path))
    assert (examples_fingerprint(settings(source=path, **change)) != first) == another


def test_content_decides_and_not_the_folder(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    paths = [write_json_lines(folder / "a.jsonl", some_texts(5)) for folder in (tmp_path, tmp_path / "elsewhere")]
    first, moved = (examples_fingerprint(settings(source=path)) for path in paths)
    assert first == moved
    write_json_lines(tmp_path / "a.jsonl", some_texts(6))
    assert examples_fingerprint(settings(source=paths[0])) != first


@pytest.mark.parametrize("name", ["manifest.json", "train_labels.npy", "valid_inputs.bin", "tokenizer.model"])
def test_damaged_files_are_told(name: str, settings: Settings, tmp_path: Path) -> None:
    config = settings(source=write_json_lines(tmp_path / "a.jsonl", some_texts(60)))
    path = prepare_examples(config).folder / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="are damaged") as refused:
        prepare_examples(config)
    assert refused.value.problems[0].where == "data.cache_dir"
