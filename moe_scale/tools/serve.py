"""``moe-scale serve``: a server of ``/v1/completions``, as OpenAI's, for a trained run of ``recipes/lm_16l.py``."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moe_scale.errors import ConfigError, Problem
from moe_scale.tools.arguments import not_negative, port, positive
from moe_scale.tools.text_model import add_model_arguments, open_text_model

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from moe_scale.serve.scheduler import Scheduler

_LAST_SECONDS = 5
"""For the last words to requests that are ended by a stop."""

API_KEY = "MOE_SCALE_API_KEY"
"""The variable that may hold the API key."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tool's flags."""
    add_model_arguments(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; the default is for this machine alone [%(default)s]",
    )
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one [%(default)s]")
    parser.add_argument(
        "--api_key_file", metavar="FILE",
        help=f"file whose first line is a key that clients must give [the variable {API_KEY}; without either, none]",
    )  # fmt: skip
    parser.add_argument("--max_batch", type=positive, default=32, help="texts generated at a time [%(default)s]")
    parser.add_argument(
        "--max_waiting", type=not_negative, default=64,
        help="texts that wait for a place; more are answered with status 429 [%(default)s]",
    )  # fmt: skip
    parser.add_argument(
        "--grace_seconds", type=positive, default=30,
        help="how long running requests may take to end after SIGTERM [%(default)s]",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: when the run, the key or the address cannot be used.
    """
    try:
        from moe_scale.serve.app import build_app
        from moe_scale.serve.scheduler import Scheduler
    except ImportError as error:
        raise ConfigError(
            Problem("moe-scale serve", f"{error.name} is not installed", 'pip install -e ".[serve]"', True)
        ) from None
    key = _api_key(arguments.api_key_file)
    listening = _listen(arguments.host, arguments.port)
    with listening:
        model = open_text_model(arguments)
        scheduler = Scheduler(model.batch, max_running=arguments.max_batch, max_waiting=arguments.max_waiting)
        app = build_app(model, scheduler, api_key=key)
        host, number = listening.getsockname()[:2]
        if not key and not _is_loopback(host):
            print(f"warning: whoever reaches {host}:{number} can use it; {API_KEY} sets a key", file=sys.stderr)
        address = f"[{host}]" if ":" in host else host
        ready = f"{model.name} with a context of {model.context} tokens at http://{address}:{number}/v1"
        asyncio.run(_serve(app, scheduler, listening, arguments.grace_seconds, ready))


async def _serve(
    app: Starlette, scheduler: Scheduler, listening: socket.socket, grace_seconds: int, ready: str
) -> None:
    """Serve, and say so, until a signal asks to stop.

    Running requests then have their time to end; at its end, or with a second signal, they are told that there will be
    no more. A third one waits for nothing.
    """
    import uvicorn

    class Server(uvicorn.Server):
        signals = 0

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn would raise the signal again in the end, so that a stop that was asked for looked like a crash.
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.asked_to_stop)
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(ready, file=sys.stderr, flush=True)

        def asked_to_stop(self) -> None:
            self.signals += 1
            self.should_exit = True
            if self.signals == 1:
                asyncio.get_running_loop().call_later(grace_seconds, scheduler.close)
            else:
                scheduler.close()
            self.force_exit = self.signals > 2

    last = grace_seconds + _LAST_SECONDS  # of connections that nobody reads
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=last)
    await Server(config).serve(sockets=[listening])


def _port(text: str) -> int:
    return 0 if text == "0" else port(text)


def _api_key(path: str | None) -> str:
    """The key that clients must give; empty for none."""
    if path is None:
        return os.environ.get(API_KEY, "")
    try:
        key = Path(path).expanduser().read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(Problem("--api_key_file", f"cannot read {path}: {why}", this_host_only=True)) from None
    if not key:
        raise ConfigError(Problem("--api_key_file", f"the first line of {path} is empty", "write the key there", True))
    return key


def _listen(host: str, number: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        what = f"cannot listen at {host}:{number}: {error.strerror}"
        raise ConfigError(Problem("--port", what, "choose another --port or --host", True)) from None


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback
