"""Text that a tool reads, and files and standard output that it writes to."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from moe_scale.data.lines import MARK_BYTES, how_to_convert
from moe_scale.errors import ConfigError, Problem


def new_file(path: str | None) -> Path | None:
    """The file that ``--output`` names, which is still to be written; None without one.

    Raises:
        ConfigError: when it exists already, or its folder does not.
    """
    if not path:
        return None
    output = Path(path).expanduser()
    if output.exists() or not output.parent.is_dir():
        what = "exists" if output.exists() else "is in a folder that does not exist"
        raise ConfigError(Problem("--output", f"{output} {what}", "name a new file"))
    return output


def opened(path: Path | None) -> AbstractContextManager[TextIO]:
    """To write to: the new file, or standard output without one."""
    if path is None:
        return contextlib.nullcontext(sys.stdout)  # which stays open
    try:
        return path.open("x", encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem("--output", f"{path} cannot be written: {error.strerror}")) from None


def write(out: TextIO, text: str) -> None:
    """Write at once."""
    out.write(text)
    out.flush()


def read_lines(path: str | None, option: str) -> list[str]:
    """The lines of a UTF-8 file, or of standard input without one.

    Raises:
        ConfigError: at ``option``, when it cannot be read or is no UTF-8.
    """
    where = path or "standard input"
    try:
        data = Path(path).expanduser().read_bytes() if path else sys.stdin.buffer.read()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(Problem(option, f"cannot read {where}: {error.strerror}", this_host_only=True)) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        what = f"{where}, line {line}: not UTF-8 at byte {error.start}"
        raise ConfigError(Problem(option, what, how_to_convert(data[:MARK_BYTES], where), True)) from None
    return text.removesuffix("\n").split("\n") if text else []


def is_unicode(text: str) -> bool:
    """False where an argument had bytes that are no UTF-8, which Python hands on as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
