"""Uncertainty of a score, and of the difference of two scores measured on the same windows or documents.

A score is a weighted mean over observations: token NLL over windows (weights: tokens), or outcomes over documents.
Perplexity is exp of the first. Everything is resampled by observation, and paired: two variants see the same windows,
so what the windows have in common cancels. The resampling is scipy's; seeds are fixed, so a table never churns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 5000
MINIMUM = 10  # observations below which a resampled interval is not worth stating: it is NaN, and decides nothing
_BATCH = 4_000_000  # observations resampled at once
_KEPT = 1024  # intervals: a table, its summary and its figure show the same ones


@dataclass(frozen=True)
class Interval:
    """A confidence interval and the estimate inside it. Limits of NaN: too few observations to tell."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Sample:
    """What one variant scored, observation by observation. Two are equal when all their numbers are.

    values:  (n,) per window: summed token NLL; per document: the outcome, e.g. 0 or 1.
    weights: (n,) per window: its number of tokens; per document: 1.
    kind:    "perplexity" or "mean".

    >>> Sample.documents("0110").score
    0.5
    """

    values: np.ndarray
    weights: np.ndarray
    kind: str

    @classmethod
    def windows(cls, nll: Sequence[float], tokens: Sequence[int] | int) -> Sample:
        """nll (n,): summed over the tokens of a window; tokens (n,), or one number for all windows."""
        values = np.asarray(nll, float)
        return cls(values, np.broadcast_to(np.asarray(tokens, float), values.shape), "perplexity")

    @classmethod
    def documents(cls, outcomes: Sequence[float] | str) -> Sample:
        values = np.array([float(outcome) for outcome in outcomes])
        return cls(values, np.ones_like(values), "mean")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and self._numbers() == other._numbers()

    def __hash__(self) -> int:
        return hash(self._numbers())

    def _numbers(self) -> tuple[str, bytes, bytes]:
        return self.kind, self.values.tobytes(), self.weights.tobytes()

    @property
    def score(self) -> float:
        return float(_score(self.values, self.weights, self.kind))

    @property
    def lower_is_better(self) -> bool:
        return self.kind == "perplexity"


def _score(values: np.ndarray, weights: np.ndarray, kind: str, axis: int = -1) -> np.ndarray:
    mean = values.sum(axis) / weights.sum(axis)
    return np.exp(mean) if kind == "perplexity" else mean


def standard_error(outcomes: Sequence[float] | str) -> float:
    """Of the mean of independent outcomes: sample standard deviation / sqrt(n), as lm-eval states it.

    >>> round(standard_error("0011"), 4)
    0.2887
    """
    return float(stats.sem(Sample.documents(outcomes).values))


@functools.lru_cache(_KEPT)
def interval(sample: Sample, level: float = LEVEL, seed: int = 0) -> Interval:
    """Percentile bootstrap of one score over its windows or documents."""
    def statistic(values, weights, axis=-1):
        return _score(values, weights, sample.kind, axis)
    return Interval(sample.score, *_limits(_bootstrap(statistic, (sample.values, sample.weights), seed), level))


@functools.lru_cache(_KEPT)
def difference(a: Sample, b: Sample, level: float = LEVEL, seed: int = 0) -> Interval:
    """score(a) - score(b), paired over windows or documents.

    Raises ValueError if the two were not measured on the same observations.
    """
    _check_paired(a, b)
    return Interval(a.score - b.score, *_limits(_differences(a, b, seed), level))


def mean_difference(pairs: Sequence[tuple[Sample, Sample]], level: float = LEVEL, seed: int = 0) -> Interval:
    """The difference of two mean scores over several tasks; each task is resampled by itself."""
    for a, b in pairs:
        _check_paired(a, b)
    value = float(np.mean([a.score - b.score for a, b in pairs]))
    draws = np.mean([_differences(a, b, seed + i) for i, (a, b) in enumerate(pairs)], axis=0)
    return Interval(value, *_limits(draws, level))


def better(a: Sample, b: Sample, level: float = LEVEL, seed: int = 0) -> bool:
    """Whether a is better than b beyond what its windows or documents leave open: the paired interval excludes 0."""
    found = difference(a, b, level, seed)
    return found.high < 0 if a.lower_is_better else found.low > 0


def _check_paired(a: Sample, b: Sample) -> None:
    if a.kind != b.kind or a.values.shape != b.values.shape or not np.array_equal(a.weights, b.weights):
        raise ValueError(f"a paired comparison needs the same windows or documents: {a.kind} of {len(a.values)} "
                         f"against {b.kind} of {len(b.values)}")


def _differences(a: Sample, b: Sample, seed: int) -> np.ndarray:
    """(RESAMPLES,) draws of score(a) - score(b)."""
    def statistic(x, y, weights, axis=-1):
        return _score(x, weights, a.kind, axis) - _score(y, weights, b.kind, axis)
    return _bootstrap(statistic, (a.values, b.values, a.weights), seed)


def _bootstrap(statistic, data: tuple[np.ndarray, ...], seed: int) -> np.ndarray:
    """(RESAMPLES,) draws of a statistic; all NaN below MINIMUM observations."""
    if len(data[0]) < MINIMUM:
        return np.full(RESAMPLES, np.nan)
    found = stats.bootstrap(data, statistic, n_resamples=RESAMPLES, paired=True, vectorized=True, method="percentile",
                            batch=max(1, _BATCH // len(data[0])), rng=np.random.default_rng(seed))
    return found.bootstrap_distribution


def _limits(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spearman(x: Sequence[float], y: Sequence[float], level: float = LEVEL, seed: int = 0) -> Interval:
    """Spearman's rank correlation of two series, with its percentile bootstrap interval over the points.

    >>> spearman([1, 2, 3, 4], [1, 4, 9, 16]).value
    1.0
    """
    def statistic(a, b, axis=-1):
        a, b = stats.rankdata(a, axis=axis), stats.rankdata(b, axis=axis)
        a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
        spread = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
        return np.where(spread > 0, (a * b).sum(axis) / np.where(spread > 0, spread, 1), 0.0)

    a, b = np.asarray(x, float), np.asarray(y, float)
    return Interval(float(statistic(a, b)), *_limits(_bootstrap(statistic, (a, b), seed), level))
