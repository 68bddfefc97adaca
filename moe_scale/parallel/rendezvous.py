"""Where the ranks of a run meet: is the address one, and what is said while they wait for each other."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from moe_scale.errors import ConfigError, Problem, raise_if

FIRST_S = 15.0
AGAIN_S = 60.0
"""Seconds until a host says for the first time that its ranks wait, and between one time and the next."""


def check_address() -> None:
    """Look at MASTER_ADDR and MASTER_PORT, which a rank would otherwise try for many minutes.

    Raises:
        ConfigError: where one is missing, the port is none, or this host does not know the name.
    """
    problems = [
        Problem(name, "the environment variable is not set", "a launcher sets it: start the ranks by one")
        for name in ("MASTER_ADDR", "MASTER_PORT")
        if not os.environ.get(name)
    ]
    raise_if(problems)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(Problem("MASTER_PORT", f"{port!r}", "it must be the number of a port"))
    try:
        socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        what = f"host {socket.gethostname()} does not know {address!r}: {error.strerror}"
        raise ConfigError(Problem("MASTER_ADDR", what, "name the host of rank 0", this_host_only=True)) from None


@contextlib.contextmanager
def telling_of_a_wait() -> Iterator[None]:
    """Say from time to time that this host's ranks wait for the others, from the first of them."""
    over = threading.Event()

    def tell() -> None:
        begun, pause = time.monotonic(), FIRST_S
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        ranks = f"all {os.environ.get('WORLD_SIZE')} ranks"
        while not over.wait(pause):
            seconds = time.monotonic() - begun
            print(f"{socket.gethostname()}: waiting for {ranks} at {where}, {seconds:.0f} s now", file=sys.stderr)
            pause = AGAIN_S

    if os.environ.get("LOCAL_RANK") == "0":
        threading.Thread(target=tell, name="rendezvous", daemon=True).start()
    try:
        yield
    finally:
        over.set()
