"""What a recipe gives the training loop: its data, its model and its evaluation."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from moe_scale.config import MoEConfig
from moe_scale.errors import Problem
from moe_scale.parallel.groups import ParallelGroups


class Batches(Protocol):
    """An endless iterator of batches that can save and restore its position."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Task(abc.ABC):
    """One kind of training job. The loop calls the methods in the order in which they stand here."""

    tokens_per_sequence: int
    """Tokens that one sequence of a micro-batch counts for in the throughput."""

    flops_per_token: float
    """Training FLOPs a token, for the MFU."""

    sparse_layers: list[int]
    """Numbers of the layers that have experts, for the names of their metrics."""

    model_kind: str
    """The model's name for :func:`moe_scale.models.build.build_model`."""

    progressed: Callable[[], None] = staticmethod(lambda: None)
    """To be called between the batches of a long evaluation, lest it is taken for a hang; the loop sets it."""

    scores: dict[str, Literal["lower", "higher"]]
    """Held-out scores of :meth:`evaluate` that can be called best, and which way."""

    @abc.abstractmethod
    def check(self) -> list[Problem]:
        """What is wrong with the task's input, as far as a quick look tells."""

    def remarks(self) -> list[str]:
        """What a user should know of the input of a run that begins, one sentence each; asked once it is checked."""
        return []

    @abc.abstractmethod
    def prepare(self, say: Callable[[str], None]) -> None:
        """Make the data ready on this host. Called on the first rank of each host, before :meth:`open`."""

    @abc.abstractmethod
    def open(self, *, micro_batch: int, rank: int, world_size: int) -> None:
        """Open the prepared data on every rank."""

    @property
    @abc.abstractmethod
    def data_fingerprint(self) -> str:
        """Equal where the opened data is equal, wherever its files are."""

    @abc.abstractmethod
    def build_model(self, groups: ParallelGroups) -> nn.Module: ...

    @abc.abstractmethod
    def batches(self) -> Batches:
        """The endless training batches of this rank."""

    def tokens_in_step(self, budget: int) -> int:
        """Tokens, over all ranks, of the batches handed out since the last call, which was a step ago.

        Args:
            budget: what they are where every sequence has ``tokens_per_sequence``.
        """
        return budget

    def keep_beside(self, run_dir: Path) -> None:  # noqa: B027 (nothing to keep is a valid default)
        """Write what the run's folder needs besides checkpoints, such as a vocabulary; on rank 0, at every start."""

    @abc.abstractmethod
    def forward(self, engine: Any, batch: Any) -> Any:
        """Run the model on a batch; returns an output with ``loss``, ``lm_loss`` and ``moe``."""

    @abc.abstractmethod
    def evaluate(self, engine: Any) -> dict[str, Any]:
        """Held-out scores; all ranks together."""

    @abc.abstractmethod
    def summarize(self, engine: Any, scores: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
        """Lines (label, text) for the end of the run; all ranks together. Its files are written by rank 0 with
        :func:`moe_scale.train.finished.write_files`, whose lines are among them."""


def unequal_batches(moe: MoEConfig) -> list[Problem]:
    """What fails where ranks that exchange tokens have different numbers of them, as with sentences.

    ``deepspeed.moe`` sizes the exchanged buffers by the rank's own tokens where it drops, and for top-1.
    """
    if not (moe.enabled and moe.backend == "deepspeed" and moe.ep_size > 1):
        return []
    if moe.dispatch == "dropless" and moe.top_k > 1:
        return []
    what = f"deepspeed with moe.ep_size = {moe.ep_size}, moe.dispatch {moe.dispatch} and moe.top_k = {moe.top_k}"
    allowed = "its ranks need batches of one size here: choose moe.backend custom, or moe.ep_size 1"
    return [Problem("moe.backend", what, allowed + ", or dropless with moe.top_k above 1")]
