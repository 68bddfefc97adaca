"""Text on disk, tokenized once into flat files that are then read in place.

Layout of ``<cache_dir>/text/<fingerprint>/``: ``train.bin`` and ``heldout.bin`` (tokens, little-endian uint16 or
uint32), ``train_documents.npy`` and ``heldout_documents.npy`` (first token of each document, and the end),
``manifest.json``. Shape suffixes: T tokens.
"""

from __future__ import annotations

import array
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_scale.config import TextDataConfig
from moe_scale.data import cache
from moe_scale.data.packing import TokenStream
from moe_scale.data.sources import (
    SourceReport,
    check_source,
    content_hash,
    read_documents,
    source_files,
    source_root,
)
from moe_scale.data.tokenizer import TextTokenizer
from moe_scale.data.tokenizing import tokenize
from moe_scale.errors import ConfigError, Problem, raise_if

FORMAT = 1
"""Version of the files; a change of it tokenizes everything anew."""

Progress = Callable[[str], None]
"""Is told, about once a second, how far the preparation is, as a line for a human."""

_CHUNK_BYTES = 2**20
_BYTES_WORTH_WORKERS = 32 * 2**20  # below this, starting a process (it imports the main module) takes longer


@dataclass(frozen=True)
class PreparedText:
    """Tokenized text on disk.

    Attributes:
        folder: where the files are.
        train: the training split as one stream of tokens.
        heldout: the held-out split; it shares no document with ``train``.
        report: what was read and what was skipped, when the text was prepared.
        manifest: what else is known: ``tokens``, ``documents`` and ``bytes`` per split, the tokenizer.
        fingerprint: equal for equal tokens in equal order, wherever the files are.
    """

    folder: Path
    train: TokenStream
    heldout: TokenStream
    report: SourceReport
    manifest: dict[str, Any]
    fingerprint: str

    @classmethod
    def open(cls, folder: Path) -> PreparedText:
        """The text in a folder that :func:`prepare_text` made.

        Raises:
            ConfigError: at ``data.cache_dir``, when files are missing or cut off.
        """
        try:
            manifest = json.loads((folder / cache.MANIFEST).read_text(encoding="utf-8"))
            dtype, eot_id = manifest["dtype"], manifest["eot_id"]
            splits = {s: TokenStream.open(folder / f"{s}.bin", dtype, eot_id) for s in ("train", "heldout")}
            for split, stream in splits.items():
                if stream.num_tokens != manifest["tokens"][split]:
                    raise ValueError(f"{split}.bin has {stream.num_tokens} tokens, not {manifest['tokens'][split]}")
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                Problem(
                    "data.cache_dir",
                    f"the prepared text in {folder} is damaged ({error})",
                    "delete that folder; it is made again from the source",
                    this_host_only=True,
                )
            ) from error
        return cls(
            folder,
            splits["train"],
            splits["heldout"],
            SourceReport(**manifest["report"]),
            manifest,
            manifest["content"],
        )

    def document_starts(self, split: str) -> np.ndarray:
        """First token of each document of ``train`` or ``heldout`` and, last, the end: [documents + 1] int64."""
        return np.load(self.folder / f"{split}_documents.npy", mmap_mode="r")


def prepare_text(config: TextDataConfig, tokenizer: TextTokenizer, progress: Progress | None = None) -> PreparedText:
    """Tokenize the sample or the local files of ``config``, or open what an earlier call made.

    The result depends on the files' names and content, the tokenizer, ``text_field`` and ``holdout_fraction`` only.
    Any number of processes may call this at once. Files of up to 64 MiB together are recognised by their content,
    larger ones by size and time of change.

    Args:
        progress: is told how far it is, about once a second.

    Raises:
        ConfigError: when the source is missing or holds no readable text, when the text cannot be split in two, or
            when ``cache_dir`` cannot be written.
    """
    raise_if(check_source(config))
    say = progress or (lambda line: None)
    folder = Path(config.cache_dir).expanduser() / "text" / source_fingerprint(config, tokenizer)
    cache.build_once(folder, lambda aside: _build(config, tokenizer, aside, say), say)
    return PreparedText.open(folder)


def source_fingerprint(config: TextDataConfig, tokenizer: TextTokenizer) -> str:
    """Name of the folder of the prepared text: 20 hex digits over everything that its content depends on."""
    digest = hashlib.sha256()
    for part in (FORMAT, tokenizer.fingerprint, config.text_field, config.holdout_fraction):
        digest.update(f"{part!r}\n".encode())
    cache.digest_files(digest, source_files(config), source_root(config))
    return digest.hexdigest()[:20]


def choose_heldout(hashes: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents to hold out so that their bytes are near ``fraction`` of all bytes.

    Documents are taken in the order of their content's hash, which is as good as random and depends on nothing else;
    one that would lead further from the goal is passed over. Equal documents are taken or left together.

    Args:
        hashes: [documents] uint64 content hashes.
        sizes: [documents] int64 bytes.

    Returns:
        [documents] bool; both values occur.

    Raises:
        ConfigError: at ``data.holdout_fraction``, when all documents are the same.
    """
    unique, inverse = np.unique(hashes, return_inverse=True)
    if len(unique) < 2:
        raise ConfigError(
            Problem(
                "data.holdout_fraction",
                "the source has only one document, so none can be held out for evaluation",
                "give a folder of several .txt files, or .jsonl or .parquet with a record for each document",
                True,
            )
        )
    group_bytes = np.bincount(inverse, weights=sizes, minlength=len(unique))
    goal = fraction * group_bytes.sum()
    chosen: list[int] = []
    held = 0.0
    for group, size in enumerate(group_bytes):  # np.unique sorts, so this is the order of the hashes
        if abs(held + size - goal) < abs(held - goal):
            chosen.append(group)
            held += size
        if abs(held - goal) <= 0.01 * goal:  # near enough; going on would pick the shortest of the rest
            break
    if not chosen:
        chosen = [int(group_bytes.argmin())]
    elif len(chosen) == len(unique):
        chosen.pop()
    return np.isin(inverse, chosen)


def token_dtype(tokenizer: TextTokenizer) -> str:
    """The smallest type of the token files that holds every token."""
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def _build(config: TextDataConfig, tokenizer: TextTokenizer, folder: Path, say: Progress) -> None:
    """Tokenize everything into one file, decide the split, and copy the documents into their split's file."""
    report = SourceReport()
    hashes, sizes, lengths = array.array("Q"), array.array("q"), array.array("q")
    dtype = token_dtype(tokenizer)
    source_bytes = sum(file.stat().st_size for file in source_files(config))
    workers = config.num_workers if source_bytes > _BYTES_WORTH_WORKERS else 0
    started = said = time.monotonic()
    with open(folder / "all.bin", "wb") as out:
        chunks = _chunks(read_documents(config, report), hashes, sizes)
        for tokens_T, chunk_lengths in tokenize(tokenizer, chunks, dtype, workers):
            out.write(tokens_T.tobytes())
            lengths.extend(chunk_lengths.tolist())
            if time.monotonic() - said > 1:
                said = time.monotonic()
                mb = report.bytes / 1e6
                say(f"tokenizing {config.source}: {mb:,.0f} MB of text, {mb / (said - started):,.1f} MB/s")
    hashes_N, sizes_N, lengths_N = (np.asarray(a) for a in (hashes, sizes, lengths))
    heldout_N = choose_heldout(hashes_N, sizes_N, config.holdout_fraction)
    starts_N1 = np.concatenate([[0], np.cumsum(lengths_N)])
    tokens = np.memmap(folder / "all.bin", dtype=dtype, mode="r")
    manifest: dict[str, Any] = {"format": FORMAT, "dtype": dtype, "eot_id": tokenizer.eot_id}
    manifest |= {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "source": config.source}
    manifest |= {"tokens": {}, "documents": {}, "bytes": {}, "report": asdict(report)}
    for split, members_N in (("train", ~heldout_N), ("heldout", heldout_N)):
        _write_split(folder, split, tokens, starts_N1, members_N)
        manifest["tokens"][split] = int(lengths_N[members_N].sum())
        manifest["documents"][split] = int(members_N.sum())
        manifest["bytes"][split] = int(sizes_N[members_N].sum())
    content = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint}".encode())
    content.update(hashes_N.astype("<u8").tobytes())
    content.update(heldout_N.tobytes())
    manifest["content"] = content.hexdigest()[:20]
    del tokens
    (folder / "all.bin").unlink()
    (folder / cache.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    say(f"tokenized {config.source}: {report}; {manifest['tokens']} tokens")


def _chunks(documents: Iterator[str], hashes: array.array, sizes: array.array) -> Iterator[list[str]]:
    """Lists of about a megabyte of documents; each one's hash and size in bytes are noted on the way."""
    chunk: list[str] = []
    chunk_bytes = 0
    for text in documents:
        hashes.append(content_hash(text))
        sizes.append(len(text.encode()))
        chunk.append(text)
        chunk_bytes += sizes[-1]
        if chunk_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
    if chunk:
        yield chunk


def _write_split(folder: Path, split: str, tokens: np.ndarray, starts_N1: np.ndarray, members_N: np.ndarray) -> None:
    """Copy the documents of one split, runs of neighbours at a time, and save where each starts."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], members_N, [False]]).astype(np.int8)))
    with open(folder / f"{split}.bin", "wb") as out:
        for first, end in edges.reshape(-1, 2):
            out.write(tokens[starts_N1[first] : starts_N1[end]].tobytes())
    starts = np.concatenate([[0], np.cumsum(np.diff(starts_N1)[members_N])]).astype(np.int64)
    np.save(folder / f"{split}_documents.npy", starts)
