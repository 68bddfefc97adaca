"""Kinds of values that settings have, and how a setting is declared."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from moe_scale.errors import Problem


def _usable_path(text: str) -> str:
    """The validator of settings that may hold a path: one that no file system could hold is refused here."""
    if "\0" in text or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError("it must be a path: parts of at most 255 bytes, without a null byte")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError("it begins with the home folder of a user that this machine does not have") from None
    return text


def duration_seconds(text: str) -> int | None:
    """Seconds of a time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None where it is none of these."""
    match = re.fullmatch(r"(?:([0-9]{1,6})-)?([0-9]{1,9}(?::[0-9]{1,9}){0,2})", text)
    if not match:
        return None
    parts = [int(part) for part in match[2].split(":")]
    if match[1] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(match[1]) * 86_400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = [0, *parts, 0][:3] if len(parts) < 3 else parts
    return hours * 3600 + minutes * 60 + seconds


def _duration(text: str) -> str:
    if text and not duration_seconds(text):
        raise ValueError("it must be a time as Slurm writes it: 90 (minutes), 1:30:00 or 2-12:00:00")
    return text


# The upper bounds are beyond what can be run; they catch a slip of the keyboard before something counts up to it.
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000)]
NonNegativeInt = Annotated[int, Field(ge=0, le=1_000_000)]
Count = Annotated[int, Field(ge=1, le=10**15)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Duration = Annotated[str, AfterValidator(_duration)]
PathText = Annotated[str, AfterValidator(_usable_path)]
NonEmptyText = Annotated[PathText, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

Scale = Literal["cpu", "1gpu", "1node", "multinode"]
SCALES: tuple[Scale, ...] = ("cpu", "1gpu", "1node", "multinode")


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its default and the sentence that ``--help`` prints."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


class Strict:
    """Base of every settings class: an unknown key is an error, never ignored."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def head_problems(
    where: str, width: int, width_name: str, num_heads: int, head_dim: int | None, *, rotary: bool
) -> list[Problem]:
    """Whether heads divide the model's width, or have one of their own, and can be turned.

    Args:
        where: the section, as ``model``.
        width, width_name: of the model, and the setting that it is.
        head_dim: width of a head; 0 takes its share of the model's; None is no setting of this model, and does too.
        rotary: positions turn pairs of a head's values.
    """
    if not head_dim and width % num_heads:
        what = f"{num_heads} does not divide {where}.{width_name} = {width}"
        instead = "" if head_dim is None else f" or set {where}.head_dim"
        return [Problem(f"{where}.num_heads", what, f"choose one of {divisors(width)}{instead}")]
    head_width = head_dim or width // num_heads
    if rotary and head_width % 2:
        what = f"heads are {head_width} wide, which is odd"
        allowed = "rotary embedding turns pairs of values: choose an even width"
        return [Problem(f"{where}.head_dim", what, allowed)]
    return []


def show(value: object) -> str:
    """A setting's value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def divisors(n: int) -> list[int]:
    """All divisors of ``n`` in rising order."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]
