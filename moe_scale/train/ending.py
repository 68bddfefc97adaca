"""The end of a run, once its last step is done and saved: the best weights, the summary and its files, and the mark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from moe_scale.train import checkpoint
from moe_scale.train.evaluation import restore_best
from moe_scale.train.finished import MARK, NOT_WRITTEN, Mark, write_mark

if TYPE_CHECKING:
    from moe_scale.train.run import Run


def end(run: Run) -> None:
    """The best weights, the summary and its files; last of all the mark that the run has finished.

    Raises:
        checkpoint.NotSavedError: after all that, if anything of it could not be written.
    """
    job, state = run.job, run.state
    ended = restore_best(run)
    run.at("summary")
    lines = job.task.summarize(run.engine, state.scores, job.run_dir)
    failure = run.not_saved or "; ".join(f"{label}: {text}" for label, text in lines if label == NOT_WRITTEN)
    dist.barrier()
    if job.launch.is_main:
        if not failure:
            early = run.patience is not None and run.patience.is_over
            try:
                write_mark(job.run_dir, Mark(state.step, early, state.scores))
                run.events.add("finished")
            except OSError as error:
                failure = f"{NOT_WRITTEN}: {MARK} in {job.run_dir}: {error.strerror}"
        run.progress.close()
        folder = ("run folder", str(job.run_dir.resolve()))
        _print_summary([*lines, *ended, ("tokens seen", f"{state.tokens:,}"), folder])
    everyones = [failure]
    dist.broadcast_object_list(everyones)
    if everyones[0]:
        raise checkpoint.NotSavedError(everyones[0])


def _print_summary(lines: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in lines)
    print()
    for label, text in lines:
        indented = text.replace("\n", "\n" + " " * (width + 2))
        print(f"{label:<{width}}  {indented}")
