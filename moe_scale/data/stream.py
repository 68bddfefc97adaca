"""Text too large to prepare, streamed from the Hugging Face hub: shuffled, tokenized, packed, exactly resumable.

Documents are read in blocks of ``shuffle_buffer``, and each block is shuffled by a permutation of (seed, rank, block).
Unlike a sliding shuffle buffer, whose content depends on everything read before, a block can be read again: the whole
position is where its first record is in the source, how many of its documents are used up, and how many tokens of the
next one. That is a few numbers, saved with every batch.

Shape suffixes: B batch, S sequence, T tokens of a document.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_scale.config import TextDataConfig
from moe_scale.data import cache
from moe_scale.data.packing import Batch, TokenStream, pack
from moe_scale.data.prepare import Progress, token_dtype
from moe_scale.data.sources import SourceReport, content_hash, open_stream
from moe_scale.data.tokenizer import TextTokenizer
from moe_scale.data.tokenizing import encode_documents
from moe_scale.errors import ConfigError, Problem

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

FORMAT = 1
_RECORDS_PER_MARK = 32  # how much is read again after a network error
_ENCODE_AT_ONCE = 64
_SHARDS_PER_RANK = 16
_NETWORK_LIBRARIES = {"aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3"}
# Waiting does not help when the data set is not there, may not be read, or the user has gone offline on purpose.
_LASTING = {
    "DatasetNotFoundError",
    "DisabledRepoError",
    "FileNotFoundError",
    "GatedRepoError",
    "IsADirectoryError",
    "OfflineModeIsEnabled",
    "PermissionError",
    "RepositoryNotFoundError",
}


@dataclass(frozen=True)
class Retry:
    """How network errors are met: wait ``first_wait`` seconds, then twice as long each time, up to ``longest_wait``."""

    tries: int = 5  # on top of the hub library's own, which take 25 s each time
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after the ``failures``-th failure in a row, counted from 1."""
        return min(self.first_wait * 2 ** (failures - 1), self.longest_wait)


@dataclass(frozen=True)
class Position:
    """Where the next token is: token ``token`` of document ``document`` (in shuffled order) of block ``block``.

    Attributes:
        epoch: passes over the source that are complete.
        source: ``datasets``' state before the block's first record; None at the start of the epoch.
    """

    epoch: int = 0
    block: int = 0
    source: dict[str, Any] | None = None
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class StreamedText:
    """A streamed data set. Its pieces are opened in the process that needs them; this object is small and pickles.

    Attributes:
        config: the settings; ``shuffle_buffer`` is the number of documents in a block.
        tokenizer: shared by training and evaluation.
        open_source: returns the unsplit ``datasets.IterableDataset``; None opens the one that ``config.source``
            names. It must pickle (a module's function, or a partial of one) for ``num_workers`` above 0.
        retry: how often network errors are retried.
    """

    config: TextDataConfig
    tokenizer: TextTokenizer
    open_source: Callable[[], datasets.IterableDataset] | None = None
    retry: Retry = Retry()

    @property
    def fingerprint(self) -> str:
        """Equal when a saved position means the same text."""
        c = self.config
        parts = (FORMAT, c.source, c.text_field, c.holdout_fraction, c.shuffle_buffer, self.tokenizer.fingerprint)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]

    def is_heldout(self, text: str) -> bool:
        """Whether a document is for evaluation only: decided by its content, the same on every rank and machine."""
        return content_hash(text) < self.config.holdout_fraction * 2**64

    def open(self) -> datasets.IterableDataset:
        """The unsplit source; needs the network."""
        return self.open_source() if self.open_source else open_stream(self.config)

    def heldout(self, max_tokens: int, progress: Progress | None = None) -> TokenStream:
        """The first held-out documents of the source, at least ``max_tokens`` + 1 tokens if it has that many.

        They are read once (about ``max_tokens / holdout_fraction`` tokens of text pass by) and kept in ``cache_dir``.

        Raises:
            ConfigError: when the source cannot be reached, or has no held-out document.
        """
        say = progress or (lambda line: None)
        name = hashlib.sha256(f"{self.fingerprint} {max_tokens}".encode()).hexdigest()[:20]
        folder = Path(self.config.cache_dir).expanduser() / "heldout" / name
        cache.build_once(folder, lambda aside: self._write_heldout(aside, max_tokens, say), say)
        return TokenStream.open(folder / "heldout.bin", token_dtype(self.tokenizer), self.tokenizer.eot_id)

    def _write_heldout(self, folder: Path, max_tokens: int, say: Progress) -> None:
        reader = BlockReader(self, rank=0, world_size=1, heldout=True, block_size=64)
        position, tokens = Position(), 0
        with open(folder / "heldout.bin", "wb") as out:
            while tokens <= max_tokens and position.epoch == 0:
                block = reader.read(position)
                for ids_T in encode_documents(self.tokenizer, block.texts):
                    out.write(ids_T.astype(token_dtype(self.tokenizer)).tobytes())
                    tokens += len(ids_T)
                position = block.next_position
                say(f"reading held-out documents of {self.config.source}: {tokens:,} of {max_tokens:,} tokens")
        if not tokens:
            raise ConfigError(
                Problem("data.holdout_fraction", f"no document of {self.config.source} is held out", "choose more")
            )
        manifest = {"format": FORMAT, "tokens": tokens, "source": self.config.source}
        (folder / cache.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """Documents as they come from the source, and the position of the block after them."""

    texts: list[str]
    next_position: Position


class BlockReader:
    """Reads one rank's share of the source, block after block, and mends network errors on the way.

    Args:
        heldout: read only held-out documents; otherwise only the others.
        block_size: documents in a block; the last one of an epoch is shorter.
    """

    def __init__(self, text: StreamedText, *, rank: int, world_size: int, heldout: bool, block_size: int):
        self.text = text
        self.rank = rank
        self.world_size = world_size
        self.heldout = heldout
        self.block_size = block_size
        self.report = SourceReport()
        self._live: tuple[tuple[int, Any], Any, Iterator[dict[str, Any]]] | None = None

    def read(self, position: Position) -> Block:
        """The block that starts at ``position.source``; an epoch without any document is an error.

        Raises:
            ConfigError: at ``data.source``, after the last of ``retry.tries`` tries, or when nothing is usable.
        """
        texts: list[str] = []
        mark, at_mark = position.source, 0  # texts[:at_mark] are what was read before the state `mark`
        failures, started = 0, time.monotonic()
        while True:
            try:
                dataset, records = self._records(position.epoch, mark)
                since_mark = 0
                for record in records:
                    self._take(record, texts)
                    since_mark += 1
                    full = len(texts) == self.block_size
                    if full or since_mark == _RECORDS_PER_MARK:
                        mark, at_mark, since_mark, failures = dataset.state_dict(), len(texts), 0, 0
                    if full:
                        self._live = (position.epoch, mark), dataset, records
                        return Block(texts, replace(position, source=mark, block=position.block + 1))
                self._live = None
                self._check_not_empty(position, texts)
                return Block(texts, Position(epoch=position.epoch + 1, block=position.block + 1))
            except ConfigError:
                raise
            except Exception as error:
                self._live = None
                del texts[at_mark:]
                failures = failures + 1
                self._wait(error, failures, started)

    def _records(self, epoch: int, state: dict[str, Any] | None) -> tuple[Any, Iterator[dict[str, Any]]]:
        """An iterator over this rank's records from ``state`` on: the one in use if it stands there."""
        if self._live is not None and self._live[0] == (epoch, state) and state is not None:
            _, dataset, records = self._live
            return dataset, records
        dataset = share_of(self.text.open(), self.rank, self.world_size)
        dataset.set_epoch(epoch)
        if state is not None:
            dataset.load_state_dict(state)
        return dataset, iter(dataset)

    def _take(self, record: dict[str, Any], texts: list[str]) -> None:
        field = self.text.config.text_field
        text = record.get(field)
        if not isinstance(text, str):
            self.report.skip("a record", f"no text in field {field!r}; it has {', '.join(map(repr, record))}")
        elif not text.strip():
            self.report.skip("a record", "empty text")
        else:
            try:
                if self.text.is_heldout(text) == self.heldout:
                    texts.append(text)
                self.report.documents += 1
                return
            except UnicodeEncodeError:  # half of a surrogate pair
                self.report.skip("a record", "not valid Unicode")
        if self.report.skipped == 1:
            log.warning("%s: %s", self.text.config.source, self.report.examples[0])
        if self.report.skipped >= 10_000 and not self.report.documents:
            raise ConfigError(
                Problem("data.text_field", f"no document among 10,000 records: {self.report.examples[0]}")
            )

    def _check_not_empty(self, position: Position, texts: list[str]) -> None:
        if texts or position.source is not None or self.heldout:
            return
        why = f" ({self.report.examples[0]})" if self.report.examples else ""
        share = f"share {self.rank} of {self.world_size}"
        raise ConfigError(
            Problem(
                "data.source",
                f"{self.text.config.source} has no document in {share}{why}",
                "choose a larger source, or fewer ranks",
                True,
            )
        )

    def _wait(self, error: Exception, failures: int, started: float) -> None:
        """Sleep before the next try, or give up with a message that says what was tried."""
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"
        source, retry = self.text.config.source, self.text.retry
        if not is_transient(error) and not _is_lasting(error):
            raise error  # a mistake in a program, whose stack is needed
        if _is_lasting(error):
            raise ConfigError(
                Problem(
                    "data.source",
                    f"cannot read {source} ({reason})",
                    "check its name and your access to it, or choose sample or a path",
                    True,
                )
            ) from error
        if failures >= retry.tries:
            tried = f"{failures} tries in a row failed, {time.monotonic() - started:.0f} s in all"
            raise ConfigError(
                Problem(
                    "data.source",
                    f"cannot reach {source}: {tried}, the last with {reason}",
                    "check the network, the proxy and HF_ENDPOINT, or choose sample or a path",
                    True,
                )
            ) from error
        wait = retry.wait(failures)
        log.warning("%s: %s; try %d of %d in %.0f s", source, reason, failures + 1, retry.tries, wait)
        time.sleep(wait)


def share_of(dataset: datasets.IterableDataset, rank: int, world_size: int) -> datasets.IterableDataset:
    """One rank's share of the records; together the shares are the data set, and none overlap.

    ``split_dataset_by_node`` deals out files only when the ranks divide their number; otherwise every rank downloads
    everything and drops all but its share. Dealing out the row groups of Parquet files avoids that.
    """
    from datasets.distributed import split_dataset_by_node

    if world_size == 1:
        return dataset
    if dataset.num_shards % world_size:
        finer = dataset.reshard()
        if finer.num_shards >= _SHARDS_PER_RANK * world_size:  # so many that the shares are about equal
            return finer.shard(num_shards=world_size, index=rank, contiguous=False)
    return split_dataset_by_node(dataset, rank=rank, world_size=world_size)


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: errors of the network, unless they say that the data set is not to be had."""
    kinds = type(error).__mro__
    network = any(k in (OSError, EOFError) or k.__module__.split(".")[0] in _NETWORK_LIBRARIES for k in kinds)
    return network and not _is_lasting(error)


def _is_lasting(error: BaseException) -> bool:
    return any(kind.__name__ in _LASTING for kind in type(error).__mro__)


class StreamPacker:
    """One rank's training stream: an endless iterator of (batch, position after it)."""

    def __init__(self, text: StreamedText, *, micro_batch: int, rank: int, world_size: int, seed: int, in_worker: bool):
        self.text = text
        self.micro_batch = micro_batch
        self.rank = rank
        self.seed = seed
        self.in_worker = in_worker
        self.reader = BlockReader(
            text, rank=rank, world_size=world_size, heldout=False, block_size=text.config.shuffle_buffer
        )

    def batches(self, position: Position) -> Iterator[tuple[Batch, Position]]:
        """Batches from ``position`` on; equal positions give equal batches."""
        seq_len, eot_id = self.text.config.seq_len, self.text.tokenizer.eot_id
        documents = self._documents(position)
        held: collections.deque[tuple[Position, np.ndarray]] = collections.deque()  # documents not used up
        token, available = position.token, -position.token  # next token of held[0]; tokens held from there on
        rows = np.empty((self.micro_batch, seq_len + 1), dtype=np.int64)
        while True:
            for row in rows:
                while available < seq_len + 1:
                    held.append(next(documents))
                    available += len(held[-1][1])
                filled, start = 0, token
                for _, ids_T in held:
                    piece = ids_T[start : start + seq_len + 1 - filled]
                    row[filled : filled + len(piece)] = piece
                    filled, start = filled + len(piece), 0
                    if filled == seq_len + 1:
                        break
                token, available = token + seq_len, available - seq_len
                while token >= len(held[0][1]):
                    token -= len(held.popleft()[1])
            # pack() makes copies where it must, so the rows can be filled again only after a copy here.
            yield pack(rows.copy(), eot_id), replace(held[0][0], token=token)

    def _documents(self, position: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """The shuffled documents from ``position.document`` on, tokenized, each with the position of its start."""
        for start, block in self._blocks(replace(position, document=0, token=0)):
            # RandomState: numpy promises that its numbers never change between releases.
            seed = [self.seed & 0xFFFFFFFF, self.seed >> 32, self.rank, start.block]
            order = np.random.RandomState(seed).permutation(len(block.texts))
            first = position.document if start.block == position.block else 0
            for at in range(first, len(order), _ENCODE_AT_ONCE):
                texts = [block.texts[i] for i in order[at : at + _ENCODE_AT_ONCE]]
                encoded = encode_documents(self.text.tokenizer, texts, threads=self.in_worker)
                for offset, ids_T in enumerate(encoded):
                    yield replace(start, document=at + offset), ids_T

    def _blocks(self, position: Position) -> Iterator[tuple[Position, Block]]:
        if not self.in_worker:
            while True:
                block = self.reader.read(position)
                yield position, block
                position = block.next_position
        # In a worker process the next block is read while this one is tokenized.
        with ThreadPoolExecutor(1, thread_name_prefix="read-text") as thread:
            ahead = thread.submit(self.reader.read, position)
            while True:
                block = ahead.result()
                ahead = thread.submit(self.reader.read, block.next_position)
                yield position, block
                position = block.next_position


def use_threads(num_workers: int) -> None:
    """Let the tokenizer of this (worker) process use ``num_workers`` threads; must come before its first use."""
    os.environ["RAYON_NUM_THREADS"] = str(max(1, num_workers))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_workers > 1 else "false"


def position_to_json(position: Position) -> dict[str, Any]:
    return asdict(position)
