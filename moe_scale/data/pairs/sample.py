"""The installed sample: the messages of Gramps, a program for genealogy, in English and 15 translations."""

from __future__ import annotations

import functools
import gettext
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from moe_scale.errors import ConfigError, Problem

SAMPLE_PACKAGE = "gramps"
SAMPLE_INSTALL = "pip install --no-deps gramps==6.0.8"

ENGLISH = "en"
_TRANSLATIONS = ("ca", "de", "el", "eo", "es", "fi", "fr", "hu", "it", "nl", "no", "pl", "pt", "ru", "sv")
CATALOGUES = {code: code for code in _TRANSLATIONS} | {"no": "nb", "pt": "pt_PT"}  # no is Bokmål in opus_books too
"""Language code to the name of its message catalogue; English is what messages are called by."""

SAMPLE_LANGUAGES = tuple(sorted([ENGLISH, *CATALOGUES]))

_CONTEXT = "\x04"  # gettext puts it between the context of a message and the message
_PLACEHOLDER = re.compile(r"(%\(\w*\)[-+ #\d.]*\w|%[-+ #\d.]*[a-zA-Z]|\{[^{}]*\}|<[^<>]*>)")
_UNDERSCORE = re.compile(r"_(?=\w)")
_NAME = re.compile(r"[a-z]_[A-Z]")
_WORD = re.compile(r"\w+")

MessageKey = str | tuple[str, int]


def sample_problem() -> Problem | None:
    """What is wrong with the installation of the sample, if anything."""
    missing = [code for code in CATALOGUES if code not in catalogue_files()]
    if not missing:
        return None
    what = (
        f"the sample's messages ({SAMPLE_PACKAGE}) are not installed"
        if len(missing) == len(CATALOGUES)
        else (f"the sample's messages ({SAMPLE_PACKAGE}) have no catalogue for {', '.join(missing)}")
    )
    return Problem("data.source", what, SAMPLE_INSTALL, this_host_only=True)


@functools.cache
def catalogue_files() -> dict[str, Path]:
    """Language code to the installed catalogue; empty where the package is not installed."""
    try:
        installed = importlib.metadata.files(SAMPLE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {
        path.parts[-3]: Path(str(path.locate()))
        for path in installed
        if path.name == "gramps.mo" and path.parts[-2] == "LC_MESSAGES"
    }
    return {code: found[name] for code, name in CATALOGUES.items() if name in found and found[name].is_file()}


def sample_records(languages: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The messages in those of ``languages`` that have them, as (where it is, language to text).

    GTK's accelerators (``_Add``, ``E_dge``) are taken off a message and its translations.

    Raises:
        ConfigError: at ``data.source``, when the catalogues are not installed or damaged.
    """
    messages = {code: _read_catalogue(code) for code in languages if code != ENGLISH}
    keys: dict[MessageKey, None] = {}
    for translations in messages.values():
        keys |= dict.fromkeys(translations)
    words = {word.casefold() for key in keys for word in _WORD.findall(_message(key))}
    for key in keys:
        message = _message(key)
        texts = {code: translations[key] for code, translations in messages.items() if key in translations}
        if has_accelerator(message, words):
            message = without_accelerator(message)
            texts = {code: without_accelerator(text) for code, text in texts.items()}
        if ENGLISH in languages:
            texts[ENGLISH] = message
        yield f"message {_message(key)[:40]!r}", texts


def has_accelerator(message: str, words: set[str]) -> bool:
    """Whether the one underscore of an English message marks a key to press.

    It does at the start of a word. Inside a word it may as well be part of a name (``Not_Related``, ``enclosed_by``);
    it is taken for a mark where the word without it is among ``words``, those of all messages, without case.
    """
    plain = _PLACEHOLDER.sub(" ", message)
    if plain.count("_") != 1 or not _UNDERSCORE.search(plain) or _NAME.search(plain):
        return False
    word = next(word for word in _WORD.findall(plain) if "_" in word)
    return word.startswith("_") or word.replace("_", "").casefold() in words


def without_accelerator(text: str) -> str:
    """``text`` without the underscores before letters, those inside placeholders and tags apart."""
    parts = _PLACEHOLDER.split(text)  # at odd places: the placeholders
    return "".join(part if odd % 2 else _UNDERSCORE.sub("", part) for odd, part in enumerate(parts))


def _read_catalogue(code: str) -> dict[MessageKey, str]:
    """Message to translation, of plural messages the first form, without the header."""
    path = catalogue_files().get(code)
    try:
        if path is None:
            raise FileNotFoundError(f"no catalogue for {code}")
        with open(path, "rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]  # no public way to list it
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem("data.source", f"the sample's messages cannot be read ({error})", SAMPLE_INSTALL, True)
        ) from error
    return {
        key: text for key, text in catalogue.items() if _message(key) and not (isinstance(key, tuple) and key[1] > 0)
    }


def _message(key: MessageKey) -> str:
    """The English text that a catalogue's key stands for."""
    return (key if isinstance(key, str) else key[0]).rpartition(_CONTEXT)[2]
