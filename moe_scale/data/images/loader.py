"""Endless training batches of images and texts, read and augmented by worker processes, exactly resumable.

The order is a function of the seed alone: global sample g is an image (or a question, or an example), its caption and
its augmentation are functions of (seed, g), and batch m of rank r has the samples from (m * world_size + r) * batch on.
So ranks together see the same samples whatever their number, and a position is one number.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.utils.data

from moe_scale.config import ImageTextDataConfig
from moe_scale.data.images.batches import ImageTextBatch, make_batch
from moe_scale.data.images.prepare import PreparedImageText
from moe_scale.data.images.store import KeptImages
from moe_scale.data.loader import TrainLoader, require_same
from moe_scale.data.packing import SampleOrder
from moe_scale.data.report import SkipReport

log = logging.getLogger(__name__)

BLOCK = 64
"""Neighbours in the source that stay together until they are shuffled: what a disk reads in one go."""

_PREFETCHED_BATCHES = 4  # of each worker


class BlockOrder(SampleOrder):
    """An order for images that are read from shards: shuffled, but read in runs of neighbours.

    Each epoch the blocks of 64 neighbours are permuted, and then the samples within each ``buffer`` of them.
    """

    def __init__(self, num_sequences: int, seed: int, buffer: int):
        super().__init__(num_sequences, seed)
        self.buffer = buffer

    def _permuted(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            random = np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch])
            blocks = random.permutation(-(-self.num_sequences // BLOCK))
            order = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
            order = order[order < self.num_sequences]
            for first in range(0, len(order), self.buffer):
                random.shuffle(order[first : first + self.buffer])
            self._permutation, self._epoch = order, epoch
        return self._permutation


def train_loader(
    data: PreparedImageText, config: ImageTextDataConfig, *, micro_batch: int, rank: int, world_size: int, seed: int
) -> ImageTextLoader:
    """The training batches of one rank, endless.

    Args:
        micro_batch: that of the DeepSpeed JSON: a batch has ``micro_batch * data.batch_examples`` rows.
        seed: of the order, of the captions that are chosen and of the augmentation.
    """
    return ImageTextLoader(data, config, micro_batch * config.batch_examples, rank, world_size, seed)


class ImageTextLoader(TrainLoader[ImageTextBatch]):
    """An epoch has each image once, with one of its captions; of questions and examples, each of them once.

    Attributes:
        report: images that could not be read, in batches that were handed out; each is logged as it is met.
    """

    def __init__(
        self,
        data: PreparedImageText,
        config: ImageTextDataConfig,
        batch: int,
        rank: int,
        world_size: int,
        seed: int,
    ):
        self.data, self.config = data, config
        self.batch, self.rank, self.world_size, self.seed = batch, rank, world_size, seed
        self.report = SkipReport()
        self._side = _WorkerSide(data.folder, config, batch, rank, world_size, seed)
        self._side.data = data
        self._identity = {"kind": "image_text", "seed": seed, "fingerprint": data.fingerprint} | {
            name: getattr(config, name) for name in ("augment", "crop_area", "mirror", "color", "shuffle_buffer")
        }
        self._done = 0  # samples handed out, over all ranks
        self._tokens = 0
        self._batches: Iterator[tuple[ImageTextBatch, SkipReport]] | None = None

    def __next__(self) -> ImageTextBatch:
        if self._batches is None:
            self._batches = self._start()
        batch, report = next(self._batches)
        self._count(report)
        everyones = self._side.samples(self._done, self.batch * self.world_size)
        self._tokens += int(self._side.split.lengths_T[everyones].sum())
        self._done += self.batch * self.world_size
        return batch

    def _count(self, report: SkipReport) -> None:
        for reason, count in report.skipped.items():
            for where in report.examples[reason]:
                self.report.skip(reason, where)
                log.warning("image left out: %s: %s", reason, where)
            self.report.skipped[reason] += count - len(report.examples[reason])

    def take_tokens(self) -> int:
        """Tokens without padding of all ranks' batches since the last call; equal on all ranks."""
        taken, self._tokens = self._tokens, 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self._done, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, of any number of ranks: the position is the same on all."""
        require_same(state, self._identity)
        self.close()
        self._done, self._tokens = int(state["samples"]), 0

    def close(self) -> None:
        self._batches = None  # the last reference: torch ends the workers

    def _start(self) -> Iterator[tuple[ImageTextBatch, SkipReport]]:
        positions = _Positions(self._done, self.batch * self.world_size)
        if not self.config.num_workers:
            return (self._side[position] for position in positions)
        return iter(
            torch.utils.data.DataLoader(
                self._side,
                sampler=positions,
                batch_size=None,
                num_workers=self.config.num_workers,
                prefetch_factor=_PREFETCHED_BATCHES,
                collate_fn=_as_it_is,
                worker_init_fn=_ignore_signals,
                multiprocessing_context="spawn",  # the parent may hold threads and a GPU
                generator=torch.Generator(),  # or each start would draw a seed from the training's own generator
            )
        )


class _Positions(torch.utils.data.Sampler[int]):
    """First global samples of the steps, endless."""

    def __init__(self, first: int, step: int):
        self.first, self.step = first, step

    def __iter__(self) -> Iterator[int]:
        position = self.first
        while True:
            yield position
            position += self.step


class _WorkerSide(torch.utils.data.Dataset):
    """Makes any batch from its position; pickles without the data, which each process opens by itself."""

    def __init__(self, folder: Path, config: ImageTextDataConfig, batch: int, rank: int, world_size: int, seed: int):
        self.folder, self.config = folder, config
        self.batch, self.rank, self.world_size, self.seed = batch, rank, world_size, seed
        self.data: PreparedImageText | None = None
        self._order: SampleOrder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"data": None, "_order": None}

    @property
    def split(self) -> Any:
        if self.data is None:
            self.data = PreparedImageText.open(self.folder, self.config)
        return self.data.split("train")

    def samples(self, first: int, count: int) -> np.ndarray:
        """The texts of the global samples from ``first`` on, [count] int64."""
        split = self.split
        by_item = self.config.goal == "retrieval"
        if self._order is None:
            assert self.data is not None
            size = len(split) if by_item else split.num_texts
            near = self.data.images is not None and not isinstance(self.data.images, KeptImages)
            buffer = self.config.shuffle_buffer
            self._order = BlockOrder(size, self.seed, buffer) if near else SampleOrder(size, self.seed)
        units = self._order.span(first, count)
        if not by_item:
            return units
        counts = split.first_M1[units + 1] - split.first_M1[units]
        numbers = _mixed(np.arange(first, first + count, dtype=np.uint64), self.seed)
        found: np.ndarray = split.first_M1[units] + (numbers % counts.astype(np.uint64)).astype(np.int64)
        return found

    def __getitem__(self, position: int) -> tuple[ImageTextBatch, SkipReport]:
        first = position + self.rank * self.batch
        texts = self.samples(first, self.batch).tolist()
        report = SkipReport()
        assert self.data is not None
        batch = make_batch(
            self.data,
            self.split,
            texts,
            self.config,
            report=report,
            samples=range(first, first + self.batch),
            seed=self.seed,
        )
        return batch, report


def _mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """64 bits for each number, as good as random: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        mixed = (numbers + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return found


def _ignore_signals(worker: int) -> None:
    # A launcher that is stopped signals every process; workers are needed until the rank has saved.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _as_it_is(item: Any) -> Any:
    return item
