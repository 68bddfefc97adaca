"""Save a run while it goes on, and find the checkpoint that it continues from.

Every rank writes the shards that it holds. The ranks' writers talk over a process group of their own, so that they can
finish in the background, whatever the training is doing with its groups.
"""

from __future__ import annotations

import logging
import queue
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_scale.checkpoint import folder as folders
from moe_scale.checkpoint.files import DamagedCheckpointError, read_json
from moe_scale.checkpoint.index import Index, read_index, verify
from moe_scale.checkpoint.reader import Reader
from moe_scale.checkpoint.writer import Part, Piece, join, write_part
from moe_scale.config import CheckpointConfig
from moe_scale.errors import ConfigError, Problem, StoppedError, raise_if
from moe_scale.parallel.device import rng_states, set_rng_states
from moe_scale.train import snapshot

log = logging.getLogger(__name__)

SETTINGS_THAT_MAY_CHANGE = {
    "data": ("num_workers", "cache_dir", "shuffle_buffer", "batch_examples"),
    "model": (
        "activation_checkpointing",
        "loss_chunk_tokens",
        "temperature",
        "vit_weights",
        "contrastive_weight",
        "matching_weight",
    ),
    "lora": ("dropout",),
    "moe": (
        "backend",
        "kernels",
        "conventions",
        "ep_size",
        "router_jitter",
        "router_temperature",
        "router_init_scale",
        "expert_dropout",
        "bias_update_rate",
        "dispatch",
        "capacity_factor",
        "eval_capacity_factor",
        "min_capacity",
        "drop_policy",
        "aux_loss_weight",
        "aux_loss_scope",
        "z_loss_weight",
    ),
}
"""Settings that change how a model is computed or trained, and neither what its weights are nor the data's order."""


@dataclass(frozen=True)
class Moment:
    """Where a run stands when it is saved: steps, tokens over all ranks, and held-out scores worth keeping."""

    step: int
    tokens: int
    scores: dict[str, Any]


SLOW_DISK = 50e6
"""Bytes a second that any disk should write for a rank."""


class NotSavedError(StoppedError):
    """The state that a run ends with could not be saved."""


class Saver:
    """Writes the checkpoints of a run. All ranks make one, and call its methods together.

    Args:
        run_dir: the run's folder, the same for all ranks.
        config: what is kept.
        facts: ``kind``, ``settings`` and ``layout`` of the index.
        optimizer: name of the optimizer.
        expected_bytes: that this rank will write, from which ``write_s`` is guessed before a first checkpoint.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        facts: Mapping[str, Any],
        optimizer: str,
        expected_bytes: int = 0,
    ):
        self.run_dir, self.config, self.facts, self.optimizer = run_dir, config, facts, optimizer
        self.failure = ""
        """Why the last checkpoint could not be written; empty when it was."""
        self.stall_s = 0.0
        """Seconds that the last save kept the training waiting."""
        self.write_s = expected_bytes / SLOW_DISK
        """Seconds from the begin of the last save to its end."""
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, StoppedError):
            self.wait()  # what has been begun is finished

    def save(self, engine: Any, moment: Moment, data_state: dict[str, Any], *, best: bool = False) -> None:
        """Save the run as it stands now. Failures are kept for :meth:`news`: a full disk must not end a run.

        Args:
            best: point ``checkpoints/best`` at this one.
        """
        self.wait()
        start = time.perf_counter()
        folder = folders.checkpoints_of(self.run_dir) / folders.name_of(moment.step)
        own = {"data": data_state, "rng": rng_states()}
        said = {
            **self.facts,
            "step": moment.step,
            "tokens": moment.tokens,
            "scores": moment.scores,
            "optimizer": snapshot.numbers(engine, self.optimizer),
        }
        expected = set(snapshot.logical_shapes(engine.module))
        pieces: Iterable[Piece] = snapshot.take(engine)
        if self.config.background:
            pieces = [snapshot.on_host(piece) for piece in pieces]
            self._thread = threading.Thread(
                target=self._write,
                args=(folder, pieces, own, said, expected, best, start),
                name="checkpoint",
                daemon=True,
            )
            self._thread.start()
        else:
            self._write(folder, pieces, own, said, expected, best, start)
        self.stall_s = time.perf_counter() - start

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def news(self) -> list[str]:
        """What there is to tell since the last call, on every rank the same; one line each."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def written(self) -> list[tuple[int, float]]:
        """The checkpoints that were finished since the last call: their steps, and the seconds that each took."""
        return [self._written.get() for _ in range(self._written.qsize())]

    def _write(
        self,
        folder: Path,
        pieces: Iterable[Piece],
        own: dict,
        said: dict,
        expected: set[str],
        best: bool,
        start: float,
    ) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        try:
            failures = self._everyones(lambda: folders.begin(folder) if rank == 0 else None)[1]
            parts: list[Any] = []
            if not failures:
                partial = folders.partial_of(folder)
                parts, failures = self._everyones(
                    lambda: write_part(partial, pieces, own, rank=rank, world_size=world_size)
                )
            if not failures:
                failures = self._everyones(lambda: self._publish(folder, parts, said, expected) if rank == 0 else None)[
                    1
                ]
            if failures and rank == 0:
                shutil.rmtree(folders.partial_of(folder), ignore_errors=True)
            if not failures:
                untidy = self._everyones(lambda: self._tidy(folder, best) if rank == 0 else None)[1]
                for why in untidy:
                    self._news.put(f"warning: {folder.name} is saved, but not what comes after it: {why}")
            self.failure = "; ".join(failures)
        except Exception as error:  # a lost rank: the training's own collectives fail too, and say so
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        self.write_s = time.perf_counter() - start
        if self.failure:
            self._news.put(f"warning: {folder.name} was not saved, the run goes on: {self.failure}")
        else:
            self._written.put((said["step"], self.write_s))

    def _publish(self, folder: Path, parts: list[Part], said: dict, expected: set[str]) -> None:
        """Rank 0 alone: write the index and give the folder its name, which makes it a checkpoint."""
        partial = folders.partial_of(folder)
        for part in parts:
            for name in (*part.sizes, part.rank_file):  # a saving rank always has its own state
                if not (partial / name).is_file():
                    raise DamagedCheckpointError(partial / name, "not there: do all hosts share this folder?")
        tensors, sizes, ranks = join(parts, partial)
        if missing := expected - tensors.keys():
            raise DamagedCheckpointError(partial, f"no rank wrote {min(missing)}")
        Index(tensors=tensors, sizes=sizes, ranks=ranks, **said).write(partial)
        read_index(partial)
        folders.finish(folder)

    def _tidy(self, folder: Path, best: bool) -> None:
        """Rank 0 alone, once the checkpoint is complete: point to it, and remove what need not be kept."""
        if best:
            folders.point(folder.parent / "best", folder)
        keep = {folder.name} | {link.resolve().name for link in (folder.parent / "best",) if link.exists()}
        folders.prune(self.run_dir, keep_last=self.config.keep_last, keep_every=self.config.keep_every, keep=keep)

    def _everyones(self, work: Any) -> tuple[list[Any], list[str]]:
        """Do something on every rank. Returns all results, and what failed where."""
        result, failure = None, ""
        try:
            result = work()
        except (OSError, ConfigError) as error:
            failure = f"rank {dist.get_rank()} on {socket.gethostname()}: {error}"
        except Exception as error:
            log.exception("unexpected while saving")
            failure = f"rank {dist.get_rank()} on {socket.gethostname()}: {type(error).__name__}: {error}"
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (result, failure), group=self._group)
        return [r for r, _ in gathered], [f for _, f in gathered if f]


def candidates(run_dir: Path) -> tuple[list[tuple[Path, Index]], list[ConfigError]]:
    """The run's checkpoints whose index is intact, newest first, and what is wrong with the others.

    Raises:
        ConfigError: if one cannot be read though it may be intact.
    """
    intact: list[tuple[Path, Index]] = []
    damaged: list[ConfigError] = []
    for path in folders.complete(run_dir):
        try:
            intact.append((path, read_index(path)))
        except DamagedCheckpointError as error:
            damaged.append(error)
    return intact, damaged


def check_together(path: Path, index: Index) -> list[Problem]:
    """Compare all checksums of a checkpoint, each rank a share of the files. The same answer on every rank.

    Raises:
        ConfigError: on all ranks, if one of them cannot read it though it may be intact.
    """
    damage: list[Problem] = []
    unreadable: list[Problem] = []
    try:
        verify(path, index, part=dist.get_rank(), parts=dist.get_world_size())
    except DamagedCheckpointError as error:
        damage = error.problems
    except ConfigError as error:
        unreadable = error.problems
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (damage, unreadable))
    raise_if([problem for _, problems in everyones for problem in problems])
    return [problem for problems, _ in everyones for problem in problems]


def newest_intact(run_dir: Path) -> tuple[Path, Index] | None:
    """The newest checkpoint whose every byte is as it was written; all ranks together."""
    return _first_intact(run_dir, folders.complete(run_dir))


def best_intact(run_dir: Path) -> tuple[Path, Index] | None:
    """The checkpoint that ``checkpoints/best`` points to, if it is as it was written; all ranks together."""
    link = folders.checkpoints_of(run_dir) / "best"
    return _first_intact(run_dir, [link.resolve()] if link.exists() else [])


def _first_intact(run_dir: Path, paths: list[Path]) -> tuple[Path, Index] | None:
    names = [[path.name for path in paths]]
    dist.broadcast_object_list(names)  # file systems of several hosts may lag behind each other
    for name in names[0]:
        path = folders.checkpoints_of(run_dir) / name
        try:
            index = read_index(path)
        except DamagedCheckpointError:
            continue
        if not check_together(path, index):
            return path, index
    return None


def structure_problems(path: Path, index: Index, settings: Mapping[str, Any]) -> list[Problem]:
    """Settings of the model and the data that are not those that the checkpoint was trained with."""
    found = []
    for section, may_change in SETTINGS_THAT_MAY_CHANGE.items():
        saved, mine = index.settings.get(section, {}), settings.get(section, {})
        for name, value in mine.items():
            if name not in may_change and name in saved and saved[name] != value:
                found.append(
                    Problem(
                        f"resume: {section}.{name}",
                        f"{path.name} was saved with {saved[name]}, this run has {value}",
                        f"continue with {section}.{name} {saved[name]}",
                    )
                )
    return found


def changed_settings(index: Index, settings: Mapping[str, Any]) -> list[str]:
    """What a run that continues does otherwise than the one that was saved; for its user to see."""
    found = []
    for section in ("moe", "optim", "data"):
        saved, mine = index.settings.get(section, {}), settings.get(section, {})
        changes = [
            f"{section}.{name} was {saved[name]} and is {value}"
            for name, value in mine.items()
            if name in saved and saved[name] != value
        ]
        found += changes
    return found


def load(engine: Any, path: Path, index: Index) -> dict[str, Any]:
    """Load a checked checkpoint into the engine; all ranks together. Returns this rank's position in the data.

    The random generators go on where they were if there are as many ranks as there were.

    Raises:
        ConfigError: if it holds another model, before anything is changed.
    """
    if problems := snapshot.misfits(engine, index):
        raise ConfigError(problems[:10])
    snapshot.put(engine, Reader(path, index), step=index.step)
    names = sorted(index.ranks)
    same_ranks = len(names) == dist.get_world_size()
    own = read_json(path / names[dist.get_rank() if same_ranks else 0])
    if same_ranks:
        set_rng_states(own["rng"])
    return own["data"]
