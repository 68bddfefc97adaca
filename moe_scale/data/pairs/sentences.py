"""Sentences as they are stored, and as they are told apart when the data is split."""

from __future__ import annotations

import hashlib
import unicodedata


def clean(text: str) -> str:
    """``text`` in NFC, every run of white space, line breaks included, one blank, and none at the ends.

    Raises:
        UnicodeEncodeError: for half of a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    text.encode()
    return " ".join(unicodedata.normalize("NFC", text).split())


def sentence_key(text: str) -> str:
    """What near-copies have in common: letters and digits in NFKC without case, or the text where it has none.

    ``Add``, ``_Add...`` and ``ADD`` have one key, so that they are on one side of every split.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(char for char in folded if char.isalnum()) or text


def stable_hash(text: str) -> int:
    """64 bits that depend on the text alone, on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
