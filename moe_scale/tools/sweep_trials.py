"""The trials of a sweep: what varies, in which values, and the command line of each trial."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe_scale.errors import ConfigError, Problem, raise_if

T = TypeVar("T")

MAX_NAME = 100
"""Letters of a trial's name: a folder's may have 255 bytes, and a log's ending is added."""
DIGITS = 4
"""Significant digits of a drawn number: more say nothing, and make long names."""
TRIES = 100
"""Draws for each trial before a sweep is said to have too few different ones."""
KINDS = "log:1e-4:1e-2, uniform:0:0.5, int:1:8 or choice:a,b,c"


@dataclass(frozen=True)
class Draw:
    """Where the values of a setting are drawn from.

    Attributes:
        name: dotted path of the setting.
        kind: ``log`` (evenly over the logarithm), ``uniform``, ``int`` (both ends included) or ``choice``.
        low, high: the ends of the first three.
        choices: of the last.
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def value(self, stream: random.Random) -> str:
        """One value, as it is written on a command line."""
        if self.kind == "choice":
            return stream.choice(self.choices)
        if self.kind == "int":
            return str(stream.randint(int(self.low), int(self.high)))
        if self.kind == "log":
            drawn = math.exp(stream.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = stream.uniform(self.low, self.high)
        return f"{min(max(drawn, self.low), self.high):.{DIGITS}g}"


@dataclass(frozen=True)
class Space:
    """What a sweep varies. Grid or draws, variants and repeats are combined with each other.

    Attributes:
        grid: the values of each setting.
        draws: of which each trial takes a value of its own; instead of a grid.
        trials: how many times all draws are made.
        draw_seed: of the draws.
        variants: settings that go together, by the variant's name.
        seeds: the values of ``seed``; an empty one leaves it as it is.
    """

    grid: Mapping[str, tuple[str, ...]]
    draws: tuple[Draw, ...] = ()
    trials: int = 0
    draw_seed: int = 0
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    @property
    def varied(self) -> list[str]:
        """Dotted names of all settings that trials may differ in, but for the seed of repeats."""
        own = [*self.grid, *(draw.name for draw in self.draws)]
        return list(dict.fromkeys([*own, *(name for fixed in self.variants.values() for name in fixed)]))

    @property
    def factors(self) -> list[str]:
        """What varies, but for the seed of repeats: ``variant`` and the dotted settings."""
        return [*(["variant"] if len(self.variants) > 1 else []), *self.grid, *(draw.name for draw in self.draws)]


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    Attributes:
        name: of its folder.
        variant: its variant's name; empty where there are none.
        values: of the grid or the draws, as text, by dotted setting.
        settings: ``values`` with those of the variant and the seed: all that sets the trial apart.
    """

    name: str
    variant: str
    values: dict[str, str]
    settings: dict[str, str]

    @property
    def cell(self) -> tuple[str, ...]:
        """Equal for repeats of the same settings."""
        return (self.variant, *self.values.values())

    def level(self, factor: str) -> str:
        """The value of one of :attr:`Space.factors`."""
        return self.variant if factor == "variant" else self.values[factor]


# --- reading the command line ----------------------------------------------------------------------------------------


def read_space(grid: Sequence[str], draws: Sequence[str], variants: Sequence[str]) -> Space:
    """What ``--grid``, ``--draw`` and ``--variant`` say.

    Raises:
        ConfigError: with all that cannot be read.
    """
    problems: list[Problem] = []

    def attempt(read: Callable[[Sequence[str]], T], texts: Sequence[str]) -> T:
        try:
            return read(texts)
        except ConfigError as error:
            problems.extend(error.problems)
            return read([])

    space = Space(attempt(read_grid, grid), attempt(read_draws, draws), variants=attempt(read_variants, variants))
    raise_if(problems)
    return space


def read_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``NAME=V1,V2`` for each setting of a grid.

    Raises:
        ConfigError: for what is written otherwise, and for names and values given twice.
    """
    grid: dict[str, tuple[str, ...]] = {}
    problems = []
    for text in texts:
        name, equals, listed = text.partition("=")
        values = tuple(value.strip() for value in listed.split(","))
        if not (equals and name and all(values)):
            problems.append(Problem("--grid", f"{text!r}", "write NAME=V1,V2, as moe.num_experts=2,4"))
        elif name in grid:
            problems.append(Problem("--grid", f"{name} is given twice", "list all of its values together"))
        else:
            problems += _given_twice("--grid", name, values)
            grid[name] = values
    raise_if(problems)
    return grid


def read_draws(texts: Sequence[str]) -> tuple[Draw, ...]:
    """``NAME=KIND:...`` for each setting that is drawn.

    Raises:
        ConfigError: for what is written otherwise, and for names given twice.
    """
    draws: dict[str, Draw] = {}
    problems: list[Problem] = []
    for text in texts:
        name, _, how = text.partition("=")
        if name in draws:
            problems.append(Problem("--draw", f"{name} is given twice", "give it once"))
            continue
        draw = _read_draw(name, how)
        if isinstance(draw, str):
            problems.append(Problem("--draw", f"{text!r}", draw))
        else:
            problems += _given_twice("--draw", name, draw.choices)
            draws[name] = draw
    raise_if(problems)
    return tuple(draws.values())


def _read_draw(name: str, how: str) -> Draw | str:
    """The draw, or what would be right."""
    kind, _, rest = how.partition(":")
    if not name or kind not in ("log", "uniform", "int", "choice"):
        return f"write NAME= and {KINDS}"
    if kind == "choice":
        choices = tuple(value.strip() for value in rest.split(","))
        return Draw(name, kind, choices=choices) if all(choices) else "write choice:a,b,c"
    ends = [_number(end) for end in rest.split(":")]
    if len(ends) != 2 or not all(math.isfinite(end) for end in ends) or not ends[0] < ends[1]:
        return f"write {kind}:LOW:HIGH, two numbers, the smaller first"
    low, high = ends
    if kind == "log" and low <= 0:
        return "the logarithm needs LOW above 0"
    if kind == "int" and not (low.is_integer() and high.is_integer()):
        return "write int:LOW:HIGH with whole numbers"
    return Draw(name, kind, low, high)


def read_variants(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """``NAME: a=b c=d`` for each variant; a value with a blank stands in quotes.

    Raises:
        ConfigError: for what is written otherwise, and for names given twice.
    """
    variants: dict[str, dict[str, str]] = {}
    problems = []
    for text in texts:
        name, colon, listed = (part.strip() for part in text.partition(":"))
        try:
            words = shlex.split(listed)
        except ValueError as error:
            problems.append(Problem("--variant", f"{text!r}: {error}", "close the quotes"))
            continue
        pairs = [word.lstrip("-").partition("=") for word in words]
        if not (name and colon) or not all(key and equals for key, equals, _ in pairs):
            problems.append(Problem("--variant", f"{text!r}", 'write "NAME: a=b c=d", as "dense: moe.enabled=false"'))
        elif name in variants:
            problems.append(Problem("--variant", f"{name!r} is given twice", "choose another name"))
        else:
            variants[name] = {key: value for key, _, value in pairs}
    raise_if(problems)
    return variants


def _given_twice(flag: str, name: str, values: Sequence[str]) -> list[Problem]:
    seen: dict[Any, str] = {}
    for value in values:
        key = number if math.isfinite(number := _number(value)) else value
        if key in seen:
            both = value if seen[key] == value else f"{seen[key]} and {value}"
            return [Problem(flag, f"{name} has {both} twice", "--repeats N trains each trial with N seeds")]
        seen[key] = value
    return []


def _number(text: str) -> float:
    """The number that a value is; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# --- making the trials -----------------------------------------------------------------------------------------------


def make_trials(space: Space) -> list[Trial]:
    """All trials, in the order in which they are trained; repeats of one last, so that an early end has each once.

    Raises:
        ConfigError: if nothing varies, or something in two ways.
    """
    raise_if(_contradictions(space))
    drawn = bool(space.draws)
    combinations = _drawn(space) if drawn else _crossed(space.grid)
    variants = space.variants or {"": {}}
    taken: set[str] = set()
    trials = []
    for seed in space.seeds or (None,):
        for number, values in enumerate(combinations, 1):
            for variant, fixed in variants.items():
                settings = {**fixed, **values, **({} if seed is None else {"seed": str(seed)})}
                shown = {**({"variant": variant} if variant else {}), **values}
                if len(space.seeds) > 1:
                    shown["seed"] = str(seed)
                name = trial_name(shown, taken, number if drawn else None)
                trials.append(Trial(name, variant, dict(values), settings))
    return trials


def _contradictions(space: Space) -> list[Problem]:
    problems = []
    varied = [*space.grid, *(draw.name for draw in space.draws)]
    if space.grid and space.draws:
        problems.append(Problem("--grid, --draw", "both are given", "write a grid's values as --draw NAME=choice:..."))
    if bool(space.draws) != bool(space.trials):
        what = "draws without a number of trials" if space.draws else "is a number of draws, and there are none"
        problems.append(Problem("--trials", what, "give both --draw and --trials N"))
    if not varied and len(space.variants) < 2 and len(space.seeds) < 2:
        problems.append(Problem("--grid", "nothing varies", "give --grid, --draw, two of --variant, or --repeats"))
    for variant, fixed in space.variants.items():
        problems += [
            Problem("--variant", f"{variant!r} sets {name}, which the sweep varies by itself", "leave one of them out")
            for name in fixed
            if name in varied or (name == "seed" and space.seeds)
        ]
    if "seed" in varied and space.seeds:
        problems.append(Problem("--repeats", "varies seed, as --grid or --draw does", "leave one of them out"))
    return problems


def _crossed(grid: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _drawn(space: Space) -> list[dict[str, str]]:
    """Different draws. A setting's values come from a stream of its own: others may be added without changing them.

    Raises:
        ConfigError: where there are fewer different ones than trials.
    """
    streams = {draw.name: random.Random(f"{space.draw_seed} {draw.name}") for draw in space.draws}
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for _ in range(TRIES * space.trials):
        values = {draw.name: draw.value(streams[draw.name]) for draw in space.draws}
        found.setdefault(tuple(values.values()), values)  # the same settings twice would be the same run twice
        if len(found) == space.trials:
            return list(found.values())
    what = f"{space.trials}, but only {len(found)} different draws were found"
    raise ConfigError(Problem("--trials", what, "choose fewer, or wider ranges; --repeats N trains each with N seeds"))


def trial_name(shown: Mapping[str, str], taken: set[str], number: int | None = None) -> str:
    """A folder's name that tells the values: ``dense_num_experts-4_lr-0.001``. No two are equal, whatever the case.

    Args:
        shown: what to tell, by dotted setting; of a variant the name alone.
        taken: names of other trials in lower case; the new one is added.
        number: of the draw, put in front.
    """
    last = [name.rpartition(".")[2] for name in shown]
    parts = [] if number is None else [f"{number:03d}"]
    for name, value in shown.items():
        short = name.rpartition(".")[2]
        key = short if last.count(short) == 1 else name
        parts.append(_slug(value) if name == "variant" else f"{_slug(key)}-{_slug(value)}")
    name = "_".join(parts) or "trial"
    if name.endswith((".log", ".failed")):  # what the files of other trials end in
        name += "_"
    if len(name) > MAX_NAME:
        mark = hashlib.sha256(repr(sorted(shown.items())).encode()).hexdigest()[:8]
        name = f"{name[: MAX_NAME - 12]}_{mark}"
    free = next(
        n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2))) if n.lower() not in taken
    )
    taken.add(free.lower())
    return free


def _slug(text: str) -> str:
    """Letters that every file system and shell takes as they are."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.") or "x"


def words(settings: Mapping[str, str], lists: Collection[str]) -> list[str]:
    """Settings as words of the recipe's command line.

    Args:
        settings: text by dotted name.
        lists: names of the settings that are lists, whose values are several words.
    """
    found = []
    for name, value in settings.items():
        found += [f"--{name}", *shlex.split(value)] if name in lists else [f"--{name}={value}"]
    return found


def value_of(text: str) -> float | int | bool | str:
    """What a value's text stands for."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    number = _number(text)
    return number if math.isfinite(number) else text


def numbers_of(values: Sequence[str]) -> list[float] | None:
    """All values as numbers; None where any of them is none."""
    numbers = [_number(value) for value in values]
    return numbers if all(math.isfinite(number) for number in numbers) else None
