"""Kinds of numbers on the tools' command lines."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number from 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number from 0."""
    return _at_least(0, text)


def not_empty(text: str) -> str:
    """Any text but none: an option whose shell variable is not set must not count as left out."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value, or leave the option out")
    return text


def port(text: str) -> int:
    """A port that programs of users may open."""
    number = _at_least(1024, text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text}: choose 1024 to 65535")
    return number


def positive_number(text: str) -> float:
    """A number above 0, as 2.5 or 1e12."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: choose a number above 0")
    return value


def not_negative_number(text: str) -> float:
    """A number from 0, as 0.02."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: choose a number from 0")
    return value


def probability(text: str) -> float:
    """A number above 0, up to 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: choose a number above 0, up to 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _at_least(least: int, text: str) -> int:
    if not text.removeprefix("-").isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: choose {least} or more")
    return int(text)
