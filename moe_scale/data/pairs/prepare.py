"""Sentence pairs on disk: read, split and tokenized once into flat files that are then read in place.

Layout of ``<cache_dir>/pairs/<fingerprint>/``: ``tokenizer.model``; for each of train, valid and test
``<split>_tokens.bin`` (little-endian uint16 or uint32) and ``<split>_texts.bin`` (UTF-8), in both of which row 2i is
the source of pair i and row 2i + 1 its target, with ``..._starts.npy``, and ``<split>_directions.npy``;
``manifest.json``. Training pairs are in the order of the source; the others are in that of their source sentence's
hash, so that the first n of them are as good as drawn at random. Shape suffixes: M pairs.
"""

from __future__ import annotations

import array
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_scale.config import PairDataConfig
from moe_scale.data import cache
from moe_scale.data.pairs.ragged import Ragged, RaggedWriter
from moe_scale.data.pairs.report import SPLITS, Pair, PairReport
from moe_scale.data.pairs.sentences import sentence_key, stable_hash
from moe_scale.data.pairs.sources import check_pair_source, named_directions, read_pairs, source_paths
from moe_scale.data.pairs.split import LEAKED, TRAIN, assign_splits
from moe_scale.data.pairs.tokenizer import MAX_PIECE_LENGTH, PairTokenizer, train_tokenizer
from moe_scale.errors import ConfigError, Problem, raise_if

FORMAT = 1
"""Version of the files; a change of it prepares everything anew."""

TOKENIZER = "tokenizer.model"
"""The vocabulary, in the folder of prepared pairs and in that of a run."""

Progress = Callable[[str], None]
"""Is told, about once a second, how far the preparation is, as a line for a human."""

_CHUNK = 2000  # pairs that are tokenized at once


class PairSplit:
    """The pairs of one split, read in place.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        directions: names of the directions.
        direction_M: [M] int64, a pair's place in ``directions``.
        source_lengths_M, target_lengths_M: [M] int64 tokens, without tag, begin and end.
    """

    def __init__(self, folder: Path, name: str, directions: list[str], dtype: str):
        self.name = name
        self.directions = directions
        self.direction_M = np.load(folder / f"{name}_directions.npy")
        self._tokens = Ragged(folder / f"{name}_tokens", dtype)
        self._texts = Ragged(folder / f"{name}_texts", "u1")
        self.source_lengths_M, self.target_lengths_M = self._tokens.lengths.reshape(-1, 2).T
        if not len(self.direction_M) * 2 == len(self._tokens) == len(self._texts):
            raise ValueError(f"the files of {name} are of unequal length")

    def __len__(self) -> int:
        return len(self.direction_M)

    def source_ids(self, index: int) -> np.ndarray:
        """Source tokens of a pair, without tag and end."""
        return self._tokens[2 * index]

    def target_ids(self, index: int) -> np.ndarray:
        """Target tokens of a pair, without begin and end."""
        return self._tokens[2 * index + 1]

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs on either side, [V] int64."""
        return np.bincount(self._tokens.flat, minlength=vocab_size)

    def text(self, index: int) -> Pair:
        """A pair as text."""
        source, target = (self._texts[2 * index + side].tobytes().decode() for side in (0, 1))
        return Pair(self.directions[self.direction_M[index]], source, target)


@dataclass(frozen=True)
class PreparedPairs:
    """Sentence pairs on disk, in three splits, with their tokenizer.

    Attributes:
        folder: where the files are.
        tokenizer: trained on the training split.
        directions: names of the directions, as ``en-de``: those of ``data.pairs`` in their order, else sorted.
        report: what was read, and what was left out, when the pairs were prepared.
        manifest: what else is known: ``tokens`` per split (both sides), the tokenizer.
        fingerprint: equal for equal tokens in equal order, wherever the files are.
    """

    folder: Path
    tokenizer: PairTokenizer
    directions: list[str]
    report: PairReport
    manifest: dict[str, Any]
    fingerprint: str
    splits: dict[str, PairSplit]

    @classmethod
    def open(cls, folder: Path) -> PreparedPairs:
        """The pairs in a folder that :func:`prepare_pairs` made.

        Raises:
            ConfigError: at ``data.cache_dir``, when files are missing or cut off.
        """
        try:
            manifest = json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))
            tokenizer = PairTokenizer.load(folder / TOKENIZER)
            directions = manifest["directions"]
            splits = {name: PairSplit(folder, name, directions, manifest["dtype"]) for name in SPLITS}
            for name, split in splits.items():
                if len(split) != manifest["pairs"][name]:
                    raise ValueError(f"{name} has {len(split)} pairs, not {manifest['pairs'][name]}")
            if tokenizer.fingerprint != manifest["tokenizer"]:
                raise ValueError(f"{TOKENIZER} is another one")
        except (OSError, ValueError, KeyError, EOFError, ConfigError) as error:
            raise ConfigError(
                Problem(
                    "data.cache_dir",
                    f"the prepared pairs in {folder} are damaged ({error})",
                    "delete that folder; it is made again from the source",
                    this_host_only=True,
                )
            ) from error
        report = PairReport(**manifest["report"])
        return cls(folder, tokenizer, directions, report, manifest, manifest["content"], splits)

    def split(self, name: str) -> PairSplit:
        """``train``, ``valid`` or ``test``."""
        return self.splits[name]


def prepare_pairs(config: PairDataConfig, vocab_size: int, say: Progress | None = None) -> PreparedPairs:
    """Read, split and tokenize the pairs of ``config``, or open what an earlier call made.

    The result depends on the files' names and content (for ``opus_books``, which is taken as it is on the hub at the
    first call, on its name), the directions, the tokenizer's settings, ``max_len`` and the held-out fractions only.
    Any number of processes may call this at once. Texts are on disk while it works; memory takes a few hundred
    bytes a pair, and what SentencePiece needs for its training.

    Args:
        vocab_size: entries of the tokenizer, ``model.vocab_size``.
        say: is told how far it is, about once a second.

    Raises:
        ConfigError: when the source is missing or holds no usable pair, when a direction has no pair to train on,
            when the text does not give ``vocab_size`` entries, or when ``cache_dir`` cannot be written.
    """
    raise_if(check_pair_source(config))
    say = say or (lambda line: None)
    folder = Path(config.cache_dir).expanduser() / "pairs" / pairs_fingerprint(config, vocab_size)
    cache.build_once(folder, lambda aside: _build(config, vocab_size, aside, say), say)
    return PreparedPairs.open(folder)


def pairs_fingerprint(config: PairDataConfig, vocab_size: int) -> str:
    """Name of the folder of the prepared pairs: 20 hex digits over everything that its content depends on."""
    digest = hashlib.sha256()
    sentencepiece = importlib.metadata.version("sentencepiece")
    parts = (FORMAT, config.pairs, config.tokenizer, sentencepiece, vocab_size, config.max_len)
    for part in (*parts, config.valid_fraction, config.test_fraction):
        digest.update(f"{part!r}\n".encode())
    files, root = source_paths(config)
    if root is None:
        digest.update(config.source.encode())
    else:
        cache.digest_files(digest, files, root)
    return digest.hexdigest()[:20]


class _Read(NamedTuple):
    """All distinct pairs of a source: their texts on disk, the rest in memory."""

    texts: Ragged
    directions: list[str]
    direction_M: np.ndarray
    source_keys_M: np.ndarray
    target_keys_M: np.ndarray

    def pair(self, index: int | np.integer) -> tuple[str, str]:
        return self.texts[2 * index].tobytes().decode(), self.texts[2 * index + 1].tobytes().decode()


def _build(config: PairDataConfig, vocab_size: int, folder: Path, say: Progress) -> None:
    """Read everything into one file, decide the split, train the tokenizer, and write each split's files."""
    report = PairReport()
    read = _read(config, report, folder / "all_texts", say)
    split_M = assign_splits(
        read.source_keys_M,
        read.target_keys_M,
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
    )
    report.leaked = _per_direction(read.directions, read.direction_M[split_M == LEAKED])
    train = np.flatnonzero(split_M == TRAIN)
    say(f"training a {config.tokenizer} tokenizer of {vocab_size} entries on {len(train):,} pairs")
    languages = {direction.split("-")[1] for direction in read.directions}
    sentences = (sentence for index in train for sentence in read.pair(index))
    tokenizer = train_tokenizer(sentences, languages, kind=config.tokenizer, vocab_size=vocab_size)
    tokenizer.save(folder / TOKENIZER)
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    manifest: dict[str, Any] = {"format": FORMAT, "source": config.source, "dtype": dtype, "pairs": {}, "tokens": {}}
    manifest |= {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "directions": read.directions}
    content = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {read.directions}".encode())
    for number, name in enumerate(SPLITS):
        members = np.flatnonzero(split_M == number)
        if number != TRAIN:
            members = members[np.lexsort((read.direction_M[members], read.source_keys_M[members]))]
        writer = _SplitWriter(folder, name, dtype, config.max_len, tokenizer)
        writer.write(read, members, report, content, say)
        manifest["pairs"][name] = writer.pairs
        manifest["tokens"][name] = writer.tokens
    _require_splits(report, config)
    (folder / "all_texts.bin").unlink()
    (folder / "all_texts_starts.npy").unlink()
    manifest |= {"report": asdict(report), "content": content.hexdigest()[:20]}
    (folder / cache.MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"prepared {config.source}: {report}")


def _read(config: PairDataConfig, report: PairReport, path: Path, say: Progress) -> _Read:
    """Every pair once, its texts written below ``path``."""
    seen: set[int] = set()
    named = named_directions(config)
    numbers: dict[str, int] = {direction: number for number, direction in enumerate(named)}
    directions, source_keys, target_keys = array.array("q"), array.array("Q"), array.array("Q")
    said = time.monotonic()
    with RaggedWriter(path, "u1") as texts:
        for pair in read_pairs(config, report):
            identity = stable_hash("\n".join(pair))
            if identity in seen:
                report.duplicates[pair.direction] = report.duplicates.get(pair.direction, 0) + 1
                continue
            seen.add(identity)
            directions.append(numbers.setdefault(pair.direction, len(numbers)))
            source_keys.append(stable_hash(sentence_key(pair.source)))
            target_keys.append(stable_hash(sentence_key(pair.target)))
            texts.append(pair.source.encode())
            texts.append(pair.target.encode())
            if time.monotonic() - said > 1:
                said = time.monotonic()
                say(f"reading {config.source}: {len(directions):,} pairs")
    names = list(named) or sorted(numbers)
    places = np.array([names.index(name) for name in numbers])
    return _Read(
        Ragged(path, "u1"), names, places[np.asarray(directions)], np.asarray(source_keys), np.asarray(target_keys)
    )


class _SplitWriter:
    """Tokenizes the pairs of one split and writes those that are not too long."""

    def __init__(self, folder: Path, name: str, dtype: str, max_len: int, tokenizer: PairTokenizer):
        self.folder = folder
        self.name = name
        self.dtype = dtype
        self.max_len = max_len
        self.tokenizer = tokenizer
        self.pairs = 0
        self.tokens = 0

    def write(self, read: _Read, members: np.ndarray, report: PairReport, content: Any, say: Progress) -> None:
        """Write the files of the split; counts go to ``report``, what is written to the digest ``content``."""
        kept: list[int] = []
        too_long: list[int] = []
        said = time.monotonic()
        with (
            RaggedWriter(self.folder / f"{self.name}_tokens", self.dtype) as tokens,
            RaggedWriter(self.folder / f"{self.name}_texts", "u1") as texts,
        ):
            for index, pair, ids in self._tokenized(read, members):
                if ids is None:
                    too_long.append(index)
                    continue
                kept.append(index)
                for text, side in zip(pair, ids, strict=True):
                    content.update(tokens.append(side) + b"\xff" * 4)
                    texts.append(text.encode())
                    self.tokens += len(side)
                if time.monotonic() - said > 1:
                    said = time.monotonic()
                    say(f"tokenizing {self.name}: {len(kept):,} of {len(members):,} pairs")
        self.pairs = len(kept)
        direction_M = read.direction_M[kept]
        np.save(self.folder / f"{self.name}_directions.npy", direction_M)
        content.update(direction_M.astype("<i8").tobytes())
        report.too_long[self.name] = _per_direction(read.directions, read.direction_M[too_long])
        counts = np.bincount(direction_M, minlength=len(read.directions))
        report.kept[self.name] = dict(zip(read.directions, map(int, counts), strict=True))

    def _tokenized(
        self, read: _Read, members: np.ndarray
    ) -> Iterator[tuple[int, tuple[str, str], tuple[list[int], list[int]] | None]]:
        """(index, texts, tokens of both sides or None where one is too long) of each pair."""
        for first in range(0, len(members), _CHUNK):
            chunk = [(int(index), read.pair(index)) for index in members[first : first + _CHUNK]]
            # A line of a megabyte need not be tokenized to know that it is too long.
            short = [max(map(len, pair)) <= self.max_len * MAX_PIECE_LENGTH for _, pair in chunk]
            texts = [text for fits, (_, pair) in zip(short, chunk, strict=True) if fits for text in pair]
            encoded = iter(self.tokenizer.encode_batch(texts))
            for fits, (index, pair) in zip(short, chunk, strict=True):
                ids = (next(encoded), next(encoded)) if fits else None
                yield index, pair, ids if ids and max(map(len, ids)) <= self.max_len else None


def _per_direction(directions: list[str], direction_M: np.ndarray) -> dict[str, int]:
    """Pairs of each direction that has any."""
    counts = np.bincount(direction_M.astype(np.int64), minlength=len(directions))
    return {direction: int(count) for direction, count in zip(directions, counts, strict=True) if count}


def _require_splits(report: PairReport, config: PairDataConfig) -> None:
    """Refuse directions without a training pair, and splits without any."""
    problems = [
        Problem(
            "data.pairs", f"no pair of {direction} is left to train on: {report}", "give more pairs, or leave it out"
        )
        for direction, count in report.kept["train"].items()
        if not count
    ]
    if not problems:
        problems = [
            Problem("data.max_len", f"{config.max_len} leaves no pair in the {split} split: {report}", "choose more")
            for split in SPLITS
            if not any(report.kept[split].values())
        ]
    raise_if(problems)
