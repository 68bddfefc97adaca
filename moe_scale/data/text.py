"""Text for a language model, from settings to batches: prepared on disk or streamed, both exactly resumable.

    text = open_text(config.data, load_tokenizer(config.data.tokenizer))
    loader = train_loader(text, config.data, micro_batch=8, rank=0, world_size=1, seed=1234)
    batch = next(loader)

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils.data

from moe_scale.config import TextDataConfig
from moe_scale.data.loader import TrainLoader, require_same
from moe_scale.data.packing import Batch, SampleOrder, padded_batches, require_sequences
from moe_scale.data.prepare import PreparedText, Progress, prepare_text
from moe_scale.data.sources import is_streamed
from moe_scale.data.stream import Position, StreamedText, StreamPacker, position_to_json, use_threads
from moe_scale.data.tokenizer import TextTokenizer
from moe_scale.errors import ConfigError, Problem

__all__ = ["Batch", "PreparedText", "StreamedText", "TrainLoader", "eval_batches", "open_text", "train_loader"]

log = logging.getLogger(__name__)

_PREFETCHED_BATCHES = 8


def open_text(
    config: TextDataConfig, tokenizer: TextTokenizer, progress: Progress | None = None
) -> PreparedText | StreamedText:
    """Prepare the text of ``config`` on disk, or set up its stream (which does not touch the network yet).

    Raises:
        ConfigError: as :func:`moe_scale.data.prepare.prepare_text`.
    """
    return StreamedText(config, tokenizer) if is_streamed(config) else prepare_text(config, tokenizer, progress)


def train_loader(
    text: PreparedText | StreamedText,
    config: TextDataConfig,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
) -> TrainLoader[Batch]:
    """The training batches of one rank, endless.

    Prepared text: every epoch is a fresh permutation of all whole sequences, a function of the seed alone. The m-th
    batch of rank r holds the global samples (m * world_size + r) * micro_batch + i for i < micro_batch, so ranks
    together see the same order whatever their number, and the state is the number of global samples used.

    Streamed text: every rank reads its own share of the source, in shuffled blocks; its state holds for the same
    rank of the same number of ranks.

    Args:
        micro_batch: sequences per batch (B).
        rank, world_size: of the data-parallel group.
        seed: of the order.

    Raises:
        ConfigError: at ``data.seq_len``, when the training text is shorter than one sequence.
    """
    if isinstance(text, PreparedText):
        return _PreparedLoader(text, config, micro_batch, rank, world_size, seed)
    return _StreamedLoader(text, micro_batch, rank, world_size, seed)


def eval_batches(
    text: PreparedText | StreamedText,
    config: TextDataConfig,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    max_tokens: int,
    progress: Progress | None = None,
) -> Iterator[Batch]:
    """Held-out sequences in order, strided over ranks; every rank gets the same number of batches.

    Every held-out token but the first is a target exactly once, over all ranks; the last sequence may be partial.
    What is missing is padded: targets -100, documents -1. Bits per byte divide the summed loss, in bits, by
    ``tokenizer.token_bytes()[targets]`` summed over targets that are not -100.

    Args:
        max_tokens: tokens scored over all ranks together, at most.

    Raises:
        ConfigError: when the held-out text has no token to score.
    """
    stream = text.heldout if isinstance(text, PreparedText) else text.heldout(max_tokens, progress)
    if stream.num_tokens < 2:
        raise ConfigError(
            Problem(
                "data.holdout_fraction",
                f"the held-out text has {stream.num_tokens} tokens, too few to score",
                "choose more",
            )
        )
    return padded_batches(
        stream, config.seq_len, micro_batch=micro_batch, rank=rank, world_size=world_size, max_tokens=max_tokens
    )


class _PreparedLoader(TrainLoader[Batch]):
    """Reads in this process: a batch is a copy of a few kilobytes from a memory map, quicker than a queue."""

    def __init__(
        self, text: PreparedText, config: TextDataConfig, micro_batch: int, rank: int, world_size: int, seed: int
    ):
        self.text = text
        self.seq_len = config.seq_len
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.order = SampleOrder(require_sequences(text.train, config.seq_len), seed)
        self.samples = 0  # global samples used, over all ranks

    def __next__(self) -> Batch:
        first = self.samples + self.rank * self.micro_batch
        batch = self.text.train.batch([self.order[first + i] for i in range(self.micro_batch)], self.seq_len)
        self.samples += self.world_size * self.micro_batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same(state, self._identity())
        self.samples = int(state["samples"])

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "prepared",
            "seed": self.order.seed,
            "seq_len": self.seq_len,
            "fingerprint": self.text.fingerprint,
        }


class _StreamedLoader(TrainLoader[Batch]):
    """Takes batches from one worker process, which reads, tokenizes (in num_workers threads) and packs ahead.

    One process, so that there is one order; every batch brings the position after it along.
    """

    def __init__(self, text: StreamedText, micro_batch: int, rank: int, world_size: int, seed: int):
        self.text = text
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.samples = 0
        self.position = Position()
        self._batches: Iterator[tuple[Batch, Position] | _Failure] | None = None

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        item = next(self._batches)
        if isinstance(item, _Failure):
            self.close()
            raise ConfigError(item.problems)
        batch, self.position = item
        self.samples += self.world_size * self.micro_batch
        return batch

    def state_dict(self) -> dict[str, Any]:
        ranks = {"rank": self.rank, "world_size": self.world_size}
        return {"samples": self.samples, "position": position_to_json(self.position), **ranks, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, or with another number of ranks, which share the source otherwise, at the
        begin of the source's next pass, in an order of its own.
        """
        require_same(state, self._identity())
        self.close()
        self.samples = int(state["samples"])
        self.position = Position(**state["position"])
        if state["world_size"] != self.world_size:
            self.position = Position(epoch=self.position.epoch + 1)
            if self.rank == 0:
                log.warning(
                    "the position in %s is that of %d ranks: these %d begin a new pass over it, in another order",
                    self.text.config.source,
                    state["world_size"],
                    self.world_size,
                )
        elif state["rank"] != self.rank:
            raise ConfigError(Problem("resume", f"the position in the data is that of rank {state['rank']}"))

    def close(self) -> None:
        self._batches = None  # the last reference: torch ends the worker

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "streamed",
            "seed": self.seed,
            "seq_len": self.text.config.seq_len,
            "fingerprint": self.text.fingerprint,
        }

    def _start(self) -> Iterator[tuple[Batch, Position] | _Failure]:
        workers = self.text.config.num_workers
        packer = StreamPacker(
            self.text,
            micro_batch=self.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            seed=self.seed,
            in_worker=workers > 0,
        )
        side = _WorkerSide(packer, self.position, workers)
        if not workers:
            return iter(side)
        return iter(
            torch.utils.data.DataLoader(
                side,
                batch_size=None,
                num_workers=1,
                prefetch_factor=_PREFETCHED_BATCHES,
                collate_fn=_as_it_is,
                multiprocessing_context="spawn",  # the parent may hold threads and a GPU
                generator=torch.Generator(),  # or each start would draw a seed from the training's own generator
            )
        )


@dataclass(frozen=True)
class _Failure:
    """A :class:`ConfigError` on its way between processes: an exception would be rebuilt from its text alone."""

    problems: list[Problem]


class _WorkerSide(torch.utils.data.IterableDataset):
    """What the worker process runs."""

    def __init__(self, packer: StreamPacker, position: Position, num_workers: int):
        self.packer = packer
        self.position = position
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[tuple[Batch, Position] | _Failure]:
        if self.num_workers:
            use_threads(self.num_workers)
            # A launcher that is stopped signals every process; this one is needed until the rank has saved.
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        try:
            yield from self.packer.batches(self.position)
        except ConfigError as error:
            yield _Failure(error.problems)


def _as_it_is(item: Any) -> Any:
    return item
