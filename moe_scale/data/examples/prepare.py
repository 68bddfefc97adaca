"""Labelled examples on disk: read, split and tokenized once into flat files that are then read in place.

Layout of ``<cache_dir>/examples/<fingerprint>/``: the vocabulary of text; for each of train, valid and test
``<split>_inputs.bin`` (tokens as little-endian uint16 or uint32, features as float32, one row an example) and
``<split>_texts.bin`` (UTF-8), with ``..._starts.npy``, and ``<split>_labels.npy``; ``manifest.json``. Training examples
are in the order of the source, the others in that of their hash, so that the first n are as good as drawn at random.
Shape suffixes: M examples.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_scale.config import ClassifierConfig
from moe_scale.data import cache
from moe_scale.data.examples.example import SPLITS, Example, ExampleReport
from moe_scale.data.examples.sources import Source, read_source, source_paths
from moe_scale.data.examples.vocabulary import Vocabulary, load_vocabulary, make_vocabulary
from moe_scale.data.pairs.ragged import Ragged, RaggedWriter
from moe_scale.errors import ConfigError, Problem

FORMAT = 1
"""Version of the files; a change of it prepares everything anew."""

TEXT_SEPARATOR = " | "
"""Between the texts of an example where they are shown."""


class ExampleSplit:
    """The examples of one split, read in place.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        labels_M: [M] int64.
        lengths_M: [M] int64 positions of each sequence.
    """

    def __init__(self, folder: Path, name: str, dtype: str, width: int):
        self.name = name
        self.labels_M = np.load(folder / f"{name}_labels.npy")
        self._inputs = Ragged(folder / f"{name}_inputs", dtype)
        self._texts = Ragged(folder / f"{name}_texts", "u1")
        self._width = width
        self.lengths_M = self._inputs.lengths // max(width, 1)
        if not len(self.labels_M) == len(self._inputs) == len(self._texts):
            raise ValueError(f"the files of {name} are of unequal length")

    def __len__(self) -> int:
        return len(self.labels_M)

    def inputs(self, index: int) -> np.ndarray:
        """Token ids [S], or features [S, I], of an example."""
        row = self._inputs[index]
        return row.reshape(-1, self._width) if self._width else row

    def text(self, index: int) -> str:
        """An example as text; empty for features."""
        return self._texts[index].tobytes().decode()

    def texts(self) -> list[str]:
        return [self.text(index) for index in range(len(self))]

    def mean_features(self) -> np.ndarray:
        """The mean of each example's positions, [M, I]."""
        return np.stack([self.inputs(index).mean(axis=0) for index in range(len(self))])


@dataclass(frozen=True)
class PreparedExamples:
    """Labelled examples on disk, in three splits.

    Attributes:
        folder: where the files are.
        vocabulary: of text; None for features.
        report: what was read, and what was left out, when the examples were prepared.
        fingerprint: equal for equal inputs and labels in equal order, wherever the files are.
    """

    folder: Path
    vocabulary: Vocabulary | None
    report: ExampleReport
    fingerprint: str
    splits: dict[str, ExampleSplit]

    @classmethod
    def open(cls, folder: Path) -> PreparedExamples:
        """The examples in a folder that :func:`prepare_examples` made.

        Raises:
            ConfigError: at ``data.cache_dir``, when files are missing or cut off.
        """
        try:
            manifest = json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))
            vocabulary = load_vocabulary(folder) if manifest["vocabulary"] else None
            if vocabulary is not None and vocabulary.fingerprint != manifest["vocabulary"]:
                raise ValueError("the vocabulary is another one")
            splits = {name: ExampleSplit(folder, name, manifest["dtype"], manifest["width"]) for name in SPLITS}
            for name, split in splits.items():
                if len(split) != manifest["examples"][name]:
                    raise ValueError(f"{name} has {len(split)} examples, not {manifest['examples'][name]}")
        except (OSError, ValueError, KeyError, EOFError, ConfigError) as error:
            raise ConfigError(
                Problem(
                    "data.cache_dir",
                    f"the prepared examples in {folder} are damaged ({error})",
                    "delete that folder; it is made again from the source",
                    this_host_only=True,
                )
            ) from error
        return cls(folder, vocabulary, ExampleReport(**manifest["report"]), manifest["content"], splits)

    def split(self, name: str) -> ExampleSplit:
        """``train``, ``valid`` or ``test``."""
        return self.splits[name]


def prepare_examples(config: ClassifierConfig, say: Callable[[str], None] | None = None) -> PreparedExamples:
    """Read, split and tokenize the examples of ``config``, or open what an earlier call made.

    The result depends on the files' names and content (for GLUE, which is taken as it is on the hub at the first call,
    on its name) and on the settings of the data, the classes, the width of features and the vocabulary only. Any
    number of processes may call this at once. A source is held in memory while it is prepared.

    Raises:
        ConfigError: as :func:`moe_scale.data.examples.sources.read_source`; when a split is left without an example or
            training with one class; when the text does not give ``model.vocab_size`` entries; or when ``cache_dir``
            cannot be written.
    """
    say = say or (lambda line: None)
    folder = Path(config.data.cache_dir).expanduser() / "examples" / examples_fingerprint(config)
    cache.build_once(folder, lambda aside: _build(config, aside, say), say)
    return PreparedExamples.open(folder)


def examples_fingerprint(config: ClassifierConfig) -> str:
    """Name of the folder of the prepared examples: 20 hex digits over everything that its content depends on."""
    data, model = config.data, config.model
    settings = {name: value for name, value in asdict(data).items() if name not in ("cache_dir", "batch_examples")}
    paths = source_paths(data)
    if paths:
        settings |= {"source": data.is_path, "heldout": bool(data.heldout)}
    digest = hashlib.sha256(f"{FORMAT} {importlib.metadata.version('sentencepiece')} {settings!r}".encode())
    digest.update(f"{model.output_size} {model.input_size if data.has_features else model.vocab_size}".encode())
    for path in paths:
        cache.digest_files(digest, [path], path.parent)
    return digest.hexdigest()[:20]


def _build(config: ClassifierConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Read everything, decide the split, make the vocabulary, and write each split's files."""
    data, report = config.data, ExampleReport()
    say(f"reading {data.source}")
    splits = split_examples(config, read_source(config, report), report)
    vocabulary = None
    if not data.has_features:
        sentences = [text for example in splits["train"] for text in example.texts]
        vocabulary = make_vocabulary(data.tokenizer, sentences, config.model.vocab_size)
        vocabulary.save(folder / vocabulary.file_name)
    dtype = "<f4" if vocabulary is None else ("<u2" if vocabulary.vocab_size <= 2**16 else "<u4")
    content = hashlib.sha256(f"{FORMAT} {vocabulary.fingerprint if vocabulary else 'features'}".encode())
    for name, examples in splits.items():
        _write_split(folder, name, examples, vocabulary, dtype, data.max_len, report, content)
        counts = np.bincount([e.label for e in examples], minlength=config.model.output_size)
        report.kept[name] = counts.tolist()
    manifest = {
        "format": FORMAT,
        "source": data.source,
        "dtype": dtype,
        "width": 0 if vocabulary else config.model.input_size,
        "vocabulary": vocabulary.fingerprint if vocabulary else "",
        "examples": {name: len(examples) for name, examples in splits.items()},
        "report": asdict(report),
        "content": content.hexdigest()[:20],
    }
    (folder / cache.MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"prepared {data.source}: {report}")


def split_examples(config: ClassifierConfig, source: Source, report: ExampleReport) -> dict[str, list[Example]]:
    """Training, validation and test examples, of which no two splits have one in common.

    Texts are the same if their letters and digits are. Of the same ones in training the first is kept, and none where
    their labels differ. An example that is both in training and held out stays in one of the two: of the sample, where
    that concerns four fifths of the held-out sentences, in training; of any other source it is held out, so that the
    held-out examples are those that its makers chose.

    Raises:
        ConfigError: when a split is left without an example, or training with one class.
    """
    data = config.data
    training = _distinct(source.training, "training", report)
    held_out = _distinct(source.held_out, "held out", report)
    in_training, held = {e.key for e in training}, {e.key for e in held_out}
    if data.source == "sample":
        unseen = [e for e in held_out if e.key not in in_training]
        report.remove("held-out examples that are in training as well: not scored", len(held_out) - len(unseen))
        held_out = unseen
    else:
        own = [e for e in training if e.key not in held]
        report.remove("training examples that are held out as well: not trained on", len(training) - len(own))
        training = own
    by_hash = sorted(training, key=lambda e: e.key)  # as good as at random, and the same on every machine
    num_test = 0 if held_out else math.ceil(data.test_fraction * len(training) - 1e-9)
    num_valid = math.ceil(data.valid_fraction * len(training) - 1e-9)
    test = held_out or by_hash[:num_test]
    valid = by_hash[num_test : num_test + num_valid]
    taken = {e.key for e in by_hash[: num_test + num_valid]}
    splits = {
        "train": [e for e in training if e.key not in taken],
        "valid": valid,
        "test": sorted(test, key=lambda e: e.key),
    }
    _require_splits(splits, report)
    return splits


def _distinct(examples: Sequence[Example], part: str, report: ExampleReport) -> list[Example]:
    """The first of those that are the same; none of those whose labels differ."""
    labels: dict[int, set[int]] = {}
    for example in examples:
        labels.setdefault(example.key, set()).add(example.label)
    agreed = [e for e in examples if len(labels[e.key]) == 1]
    report.remove(f"{part} whose copies have other labels", len(examples) - len(agreed))
    first = {e.key: e for e in reversed(agreed)}
    report.remove(f"repeated among those {part}: kept once", len(agreed) - len(first))
    return [e for e in agreed if first[e.key] is e]


def _require_splits(splits: dict[str, list[Example]], report: ExampleReport) -> None:
    for name, examples in splits.items():
        if not examples:
            what = f"no example is left in the {name} split: {report}"
            raise ConfigError(Problem("data.source", what, "give more examples, or choose other fractions", True))
    classes = {e.label for e in splits["train"]}
    if len(classes) == 1:
        what = f"all {len(splits['train'])} examples that are left to train on are of class {min(classes)}: {report}"
        raise ConfigError(Problem("data.source", what, "give examples of two classes at least", True))


def _write_split(
    folder: Path,
    name: str,
    examples: list[Example],
    vocabulary: Vocabulary | None,
    dtype: str,
    max_len: int,
    report: ExampleReport,
    content: Any,
) -> None:
    """Write the files of a split; what is cut off is counted, and what is written goes to the digest ``content``."""
    cut = 0
    labels_M = np.array([e.label for e in examples], dtype=np.int64)
    with (
        RaggedWriter(folder / f"{name}_inputs", dtype) as inputs,
        RaggedWriter(folder / f"{name}_texts", "u1") as texts,
    ):
        for example in examples:
            texts.append(TEXT_SEPARATOR.join(example.texts).encode())
            row = _tokens(example, vocabulary) if vocabulary else _rows(example)
            cut += len(row) > max_len
            kept = np.asarray(row[:max_len], dtype=dtype).ravel()
            content.update(inputs.append(kept) + b"\xff" * 4)
    content.update(labels_M.astype("<i8").tobytes())
    np.save(folder / f"{name}_labels.npy", labels_M)
    report.cut[name] = cut


def _tokens(example: Example, vocabulary: Vocabulary) -> list[int]:
    """Tokens of the texts, with a separator between them."""
    first, *others = vocabulary.encode_batch(list(example.texts))
    return first + [token for ids in others for token in (vocabulary.separator_id, *ids)]


def _rows(example: Example) -> np.ndarray:
    assert example.features_SI is not None, example.where
    return example.features_SI
