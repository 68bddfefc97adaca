"""What mattered in a sweep: how much of the metric's variance each setting explains, against what noise there is.

Of a grid, main effects by analysis of variance. SS_total = sum (y - mean)^2. The effect of a setting is what the sum of
squares of an additive model (one term a value) grows by without it; in a full grid that is its between-groups sum of
squares. eta^2 = SS_setting / SS_total (Fisher 1925; Cohen 1973). F = (SS_setting / df) / MS_error, where the error is
that of repeats (same settings, another seed), or without repeats what the additive model leaves: interactions and
noise. Of draws, Spearman's rank correlation (1904) and eta^2 over bins of equally many trials, with p by permutation
of whole draws (of variants within each draw).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moe_scale.tools.sweep_trials import numbers_of

SIGNIFICANT = 0.05
MIN_ERROR_DF = 3
"""Fewer degrees of freedom than these say next to nothing about the noise."""
MIN_DRAWS = 8
DRAWN_F = 200_000
PERMUTATIONS = 2_000
MAX_BINS = 5
VARIANT = "variant"
"""The factor that is no setting: see :attr:`moe_scale.tools.sweep_trials.Space.factors`."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """A finished trial: the values of what varies, by name, and the metric at its end."""

    levels: Mapping[str, str]
    value: float

    @property
    def cell(self) -> tuple[str, ...]:
        return tuple(self.levels.values())


@dataclass(frozen=True)
class Level:
    """One value of a setting (of draws, a bin of values): the mean of the metric over all trials that have it."""

    value: str
    mean: float
    count: int


@dataclass(frozen=True)
class Effect:
    """What a setting does to the metric.

    Attributes:
        setting: its dotted name, or ``variant``.
        levels: numbers in their order, others in that of the plan.
        share: of the metric's variance, eta squared; None where the metric does not vary.
        p: probability of such an effect, or a larger one, by chance alone; None where it cannot be told.
        rank_correlation: Spearman's, of drawn numbers.
        by_chance: the share that a setting without any effect has on average.
        verdict: in words.
    """

    setting: str
    levels: tuple[Level, ...]
    share: float | None
    p: float | None
    rank_correlation: float | None
    by_chance: float | None
    verdict: str

    @property
    def span(self) -> float:
        """The largest mean less the smallest."""
        means = [level.mean for level in self.levels]
        return max(means) - min(means)


@dataclass(frozen=True)
class Effects:
    """All of a sweep's.

    Attributes:
        effects: the largest share first.
        observations: finished trials with a finite metric, of which they tell.
        repeat_spread: standard deviation of the metric among repeats of the same settings; None without repeats.
        error: what the effects are compared with.
        remark: what they do not tell.
    """

    effects: tuple[Effect, ...] = ()
    observations: int = 0
    repeat_spread: float | None = None
    error: str = ""
    remark: str = ""


@dataclass
class _Groups:
    """Trials by their value of one setting."""

    names: list[str] = field(default_factory=list)
    codes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def main_effects(observations: Sequence[Observation], factors: Sequence[str], *, drawn: bool) -> Effects:
    """The effect of each factor.

    Args:
        observations: of the finished trials, all with a finite metric.
        factors: names in ``Observation.levels``.
        drawn: whether values were drawn at random, and not from a grid.
    """
    spread = repeat_spread(observations)
    factors = [name for name in factors if len({o.levels[name] for o in observations}) > 1]
    if not factors:
        return Effects(
            (), len(observations), spread, "", "Nothing to compare: no two values of a setting have finished trials."
        )
    found = _of_draws(observations, factors) if drawn else _of_grid(observations, factors)
    effects = tuple(sorted(found.effects, key=lambda effect: -(effect.share or 0)))
    return Effects(effects, len(observations), spread, found.error, found.remark)


def repeat_spread(observations: Sequence[Observation]) -> float | None:
    """Pooled standard deviation of repeats around the mean of their settings; None where nothing was repeated."""
    within, freedom = _within_cells(observations)
    return float(np.sqrt(within / freedom)) if freedom else None


def _within_cells(observations: Sequence[Observation]) -> tuple[float, int]:
    """The sum of squares within cells, and its degrees of freedom."""
    cells: dict[tuple[str, ...], list[float]] = {}
    for o in observations:
        cells.setdefault(o.cell, []).append(o.value)
    return sum(_squares(np.array(values)) for values in cells.values()), len(observations) - len(cells)


# --- a grid ----------------------------------------------------------------------------------------------------------


def _of_grid(observations: Sequence[Observation], factors: Sequence[str]) -> Effects:
    y = np.array([o.value for o in observations])
    groups = {name: _by_value([o.levels[name] for o in observations]) for name in factors}
    left, rank = _additive(y, list(groups.values()))
    within, within_df = _within_cells(observations)
    # Repeats tell the noise itself; what an additive model leaves has the interactions in it as well.
    by_repeats = within_df >= MIN_ERROR_DF
    error, error_df = (within, within_df) if by_repeats else (left, len(y) - rank)
    total = _squares(y)
    effects = []
    for name, group in groups.items():
        others = [other for key, other in groups.items() if key != name]
        left_without, rank_without = _additive(y, others)
        squares, freedom = max(left_without - left, 0.0), rank - rank_without
        # Below rounding, a metric does not vary.
        share = squares / total if total > 1e-20 * float(y @ y) else None
        p = _p_of_f(squares, freedom, error, error_df) if error_df >= MIN_ERROR_DF and freedom else None
        verdict = _verdict(p) if share is not None else "the metric does not vary"
        effects.append(Effect(name, _levels(group, y), share, p, None, None, verdict))
    what = "repeats of the same settings" if by_repeats else "what the sum of the effects leaves, interactions included"
    text = f"{what}: {error_df} degree{'' if error_df == 1 else 's'} of freedom" if error_df else ""
    few = "Too few trials to tell effects from noise: add --repeats, or values."
    return Effects(tuple(effects), error=text, remark=few if error_df < MIN_ERROR_DF else "")


def _additive(y: Array, groups: Sequence[_Groups]) -> tuple[float, int]:
    """Least squares with one term a value of each setting: the sum of squares that it leaves, and its rank."""
    columns = [np.ones(len(y))]
    for group in groups:
        columns += [(group.codes == code).astype(float) for code in range(1, len(group.names))]
    design = np.stack(columns, axis=1)
    terms, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ terms
    return float(rest @ rest), int(rank)


def _p_of_f(squares: float, freedom: int, error: float, error_df: int) -> float:
    """P(F >= the observed one) without an effect, for normal noise, from draws of the two chi-squares."""
    if error <= 0:
        return 1.0 if squares <= 0 else 1 / DRAWN_F
    observed = (squares / freedom) / (error / error_df)
    return (1 + int((_f_by_chance(freedom, error_df) >= observed).sum())) / (1 + DRAWN_F)


@lru_cache(maxsize=16)
def _f_by_chance(freedom: int, error_df: int) -> Array:
    draw = np.random.default_rng(0)
    return draw.chisquare(freedom, DRAWN_F) / freedom / (draw.chisquare(error_df, DRAWN_F) / error_df)


# --- draws -----------------------------------------------------------------------------------------------------------


def _of_draws(observations: Sequence[Observation], factors: Sequence[str]) -> Effects:
    cells: dict[tuple[str, ...], list[Observation]] = {}
    for o in observations:
        cells.setdefault(o.cell, []).append(o)
    y = np.array([np.mean([o.value for o in same]) for same in cells.values()])  # repeats are no draws of their own
    draws = _Draws([same[0].levels for same in cells.values()])
    effects = []
    for name in factors:
        values = [same[0].levels[name] for same in cells.values()]
        numbers = numbers_of(values)
        group = _by_value(values) if numbers is None or len(set(values)) <= MAX_BINS else _bins(np.array(numbers))
        share = _share(group, y) if _squares(y) > 1e-20 * float(y @ y) else None
        rho = None if numbers is None or share is None else spearman(numbers, y)
        p = None
        if draws.number >= MIN_DRAWS and share is not None:
            tests: list[Callable[[Array], float]] = [lambda other, group=group: _share(group, other)]  # type: ignore[misc]
            if numbers is not None:
                tests.append(lambda other, numbers=numbers: abs(spearman(numbers, other)))  # type: ignore[misc]
            p = min(1.0, len(tests) * min(_p_by_permutation(test, y, draws, name) for test in tests))
        between = _share(draws.group, y) if share is not None else 1.0
        if name == VARIANT:
            by_chance = (1 - between) / draws.number
        else:
            by_chance = between * (len(group.names) - 1) / (draws.number - 1)
        verdict = _verdict(p) if share is not None else "the metric does not vary"
        effects.append(Effect(name, _levels(group, y), share, p, rho, by_chance, verdict))
    few = f"Too few trials to tell effects from noise: {draws.number} draws, and {MIN_DRAWS} are the least."
    return Effects(tuple(effects), error="permutations of the trials", remark=few if draws.number < MIN_DRAWS else "")


class _Draws:
    """Which cells are variants of one draw.

    They are alike in all that was drawn, so they are permuted together: one by one they would count as draws of their
    own, and noise would look like an effect.
    """

    def __init__(self, levels: Sequence[Mapping[str, str]]):
        draws: dict[tuple[str, ...], list[int]] = {}
        for place, values in enumerate(levels):
            draws.setdefault(tuple(v for name, v in values.items() if name != VARIANT), []).append(place)
        self.number = len(draws)
        codes = np.zeros(len(levels), dtype=np.int64)
        alike: dict[tuple[str, ...], list[list[int]]] = {}
        for code, places in enumerate(draws.values()):
            codes[places] = code
            places = sorted(places, key=lambda place: levels[place].get(VARIANT, ""))
            alike.setdefault(tuple(levels[place].get(VARIANT, "") for place in places), []).append(places)
        self.group = _Groups([str(number) for number in range(self.number)], codes)
        self._alike = [np.array(places) for places in alike.values()]  # [draws, variants], of those with equal variants

    def permuted(self, y: Array, name: str, random: np.random.Generator) -> Array:
        """``y`` as it might be if the setting ``name`` had no effect."""
        other = y.copy()
        for places in self._alike:
            # Of variants those of each draw change places, of anything else whole draws do.
            mixed = random.permuted(places, axis=1) if name == VARIANT else random.permutation(places)
            other[places] = y[mixed]
        return other


def spearman(x: Sequence[float] | Array, y: Sequence[float] | Array) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one of them does not vary."""
    a, b = (_ranks(np.asarray(values, dtype=float)) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm else 0.0


def _ranks(values: Array) -> Array:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where]


def _bins(values: Array) -> _Groups:
    """Bins of about equally many trials, at least three in each."""
    number = int(np.clip(len(values) // 3, 2, MAX_BINS))
    codes = np.minimum(((_ranks(values) - 0.5) / len(values) * number).astype(np.int64), number - 1)
    used, codes = np.unique(codes, return_inverse=True)
    names = [f"{values[codes == code].min():g} to {values[codes == code].max():g}" for code in range(len(used))]
    return _Groups(names, codes)


def _p_by_permutation(statistic: Callable[[Array], float], y: Array, draws: _Draws, name: str) -> float:
    draw = np.random.default_rng(0)
    observed = statistic(y) * (1 - 1e-12)  # sums in another order must not count as smaller
    larger = sum(statistic(draws.permuted(y, name, draw)) >= observed for _ in range(PERMUTATIONS))
    return (1 + larger) / (1 + PERMUTATIONS)


def _share(group: _Groups, y: Array) -> float:
    """Eta squared of one way of grouping."""
    sizes = np.bincount(group.codes)
    means = np.bincount(group.codes, weights=y) / sizes
    return float((sizes * (means - y.mean()) ** 2).sum()) / _squares(y)


# --- both ------------------------------------------------------------------------------------------------------------


def _verdict(p: float | None) -> str:
    if p is None:
        return "too few trials to tell"
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return f"{'clear' if p < SIGNIFICANT else 'not told from noise'} ({shown})"


def _by_value(values: Sequence[str]) -> _Groups:
    names = list(dict.fromkeys(values))
    if numbers_of(names):
        names.sort(key=float)
    return _Groups(names, np.array([names.index(value) for value in values], dtype=np.int64))


def _levels(group: _Groups, y: Array) -> tuple[Level, ...]:
    members = [y[group.codes == code] for code in range(len(group.names))]
    return tuple(Level(n, float(m.mean()), len(m)) for n, m in zip(group.names, members, strict=True))


def _squares(y: Array) -> float:
    return float(((y - y.mean()) ** 2).sum())
