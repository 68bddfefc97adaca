"""Lines of files that are cut off, damaged or in another encoding: what is wrong, and where."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import AnyStr

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with that of UTF-16, so it comes first
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""What a text of another Unicode encoding may begin with, and what iconv calls it."""

MARK_BYTES = 4
"""Of a text, as many as tell which mark it begins with."""


def numbered(lines: Iterable[AnyStr], tell: Callable[[str], None]) -> Iterator[tuple[int, AnyStr]]:
    """Lines with their numbers, from 1, up to where the file can no longer be read.

    Args:
        lines: of an opened file; what ends them early is an archive that is cut off or damaged, or the disk.
        tell: told what is wrong then, and after which line.
    """
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            yield number, line
    except EOFError:
        tell(f"the file is cut off after line {number:,}")
    except (OSError, zlib.error) as error:
        tell(f"the file cannot be read after line {number:,}: {getattr(error, 'strerror', None) or error}")


def marked_encoding(start: bytes) -> str:
    """The Unicode encoding that a text's first bytes tell, as iconv calls it; empty for UTF-8 and for no mark."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "")


def how_to_convert(start: bytes, name: str) -> str:
    """What to do with a file that is not UTF-8: the command, with its encoding where the first bytes tell it."""
    if encoding := marked_encoding(start):
        return f"it is {encoding}: convert it by iconv -f {encoding} -t UTF-8 {name}"
    return f"convert it from its encoding, as by iconv -f WINDOWS-1252 -t UTF-8 {name}"
