"""Standard output whose reader may leave, as ``head`` does: a tool then ends quietly, as SIGPIPE ends others."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

import rich.console

EXIT_READER_LEFT = 128 + signal.SIGPIPE


class Console(rich.console.Console):
    """Rich's, which leaves it to its user to end: by itself it would end with exit code 1, as after a failure."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextlib.contextmanager
def leaving_with_the_reader() -> Iterator[None]:
    """End with :data:`EXIT_READER_LEFT`, and without a word, where standard output is a pipe that nobody reads."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        # What is still buffered must not fail again in the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_READER_LEFT) from None


def _reader_has_left() -> bool:
    """Whether it was standard output, and no pipe to a process of our own."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told of unasked
    return bool(poll.poll(0))
