"""What a paired comparison comes to: its difference and interval, tests, and one word.

better, worse: the difference is significant after Holm's correction over all tests of the comparison, its bootstrap
    interval excludes 0, and it is larger than the noise floor.
equal: two one-sided tests place the difference inside the margin. A difference that does not matter is never worse,
    however sure it is; so this is asked first.
undecided: neither; with the number of windows or documents that would decide it.

Sources: McNemar's exact test for right and wrong answers; the paired t test for other scores; Holm (1979); two
one-sided tests (Schuirmann 1987), for right and wrong answers with one pseudo-observation each way, as Bonett and Price
(2012) correct the interval of a paired difference: without it a few equal answers would prove any equality. All tests
are those of statsmodels and scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from suite import stats
from suite.errors import PTQError
from suite.stats import Interval, Sample

WORDS = ("better", "worse", "equal", "undecided")
MOST = 10_000_000  # windows or documents that nobody has


@dataclass(frozen=True)
class Rules:
    """How a difference is judged.

    level: confidence of intervals; 1 - level is the error rate of the tests, over the whole comparison.
    margin_ppl: differences in perplexity below this share do not matter; margin_acc: differences of scores between 0
    and 1. 0: no difference is too small to matter, and nothing is ever called equal.
    power: with which "the number of documents that would decide it" would.

    Raises PTQError for numbers outside their range.

    >>> Rules(margin_ppl=0.005).alpha
    0.05
    """

    level: float = stats.LEVEL
    margin_ppl: float = 0.001
    margin_acc: float = 0.01
    power: float = 0.8

    def __post_init__(self):
        for name, low, high in (("level", 0.5, 1), ("power", 0.5, 1)):
            if not low <= getattr(self, name) < high:
                raise PTQError(f"{name} is {getattr(self, name)}: allowed are numbers from {low} to below {high}")
        for name in ("margin_ppl", "margin_acc"):
            if not 0 <= getattr(self, name) < 1:
                raise PTQError(f"{name} is {getattr(self, name)}: allowed are shares from 0 to below 1, e.g. 0.01 for 1 %")

    @property
    def alpha(self) -> float:
        return round(1 - self.level, 12)


RULES = Rules()


@dataclass(frozen=True)
class Pair:
    """Two variants on the same windows or documents: `mine` is judged against `other`.

    noise: the largest difference between runs of one method, in units of the score; None where it was not measured.
    remeasured: they are one variant, measured twice: the question is whether anything moved, and where nothing did, no
    test is needed to call it equal. name: for errors.
    """

    mine: Sample
    other: Sample
    noise: float | None = None
    remeasured: bool = False
    name: str = "a task"


@dataclass(frozen=True)
class Verdict:
    """word: one of WORDS. difference: mine - other with its interval. p: of the test named; p_holm: corrected over the
    comparison; p_equal: of the equivalence test. margin: in units of the score. needed: observations that would decide,
    None if none would. why: what else there is to know."""

    word: str
    mine: float
    other: float
    difference: Interval
    test: str
    p: float
    p_holm: float
    p_equal: float
    margin: float
    noise: float | None
    n: int
    needed: int | None
    why: str

    @property
    def within_noise(self) -> bool:
        return self.noise is not None and abs(self.difference.value) <= self.noise


def judge(pairs: Sequence[Pair], rules: Rules = RULES) -> list[Verdict]:
    """The verdicts on all differences of one comparison; Holm's correction goes over all of them.

    Raises PTQError: samples that were not measured on the same windows or documents, or on fewer than stats.MINIMUM.

    >>> same = Sample.documents("0110" * 100)
    >>> judge([Pair(same, same)])[0].word
    'equal'
    """
    from statsmodels.stats.multitest import multipletests

    for pair in pairs:
        _check(pair)
    tests = [_test(pair.mine, pair.other) for pair in pairs]
    if not tests:
        return []
    corrected = multipletests([p for _, p in tests], alpha=rules.alpha, method="holm")[1]
    return [_verdict(pair, test, p, float(holm), len(pairs), rules)
            for pair, (test, p), holm in zip(pairs, tests, corrected, strict=True)]


def _check(pair: Pair) -> None:
    a, b = pair.mine, pair.other
    unit = _unit(a)
    if a.kind != b.kind or a.values.shape != b.values.shape or not np.array_equal(a.weights, b.weights):
        raise PTQError(f"{pair.name}: the two were not measured on the same {unit} ({len(a.values)} and "
                       f"{len(b.values)}), so they cannot be paired: measure both with the same task and limit")
    if len(a.values) < stats.MINIMUM:
        raise PTQError(f"{pair.name} has {len(a.values)} {unit}: a paired comparison needs at least {stats.MINIMUM}; "
                       f"raise --limit, or leave the task out")


def _unit(sample: Sample) -> str:
    return "windows" if sample.kind == "perplexity" else "documents"


def _changes(a: Sample, b: Sample) -> np.ndarray:
    """(n,) the differences of the observations; their mean is that of the scores, in nats per token for perplexity."""
    return (a.values - b.values) / a.weights.mean()


def _right_or_wrong(*samples: Sample) -> bool:
    return all(s.kind == "mean" and np.isin(s.values, (0.0, 1.0)).all() for s in samples)


def _test(a: Sample, b: Sample) -> tuple[str, float]:
    """(name, p) of the two-sided test that the scores are the same."""
    if _right_or_wrong(a, b):
        from statsmodels.stats.contingency_tables import mcnemar

        table = [[int(((a.values == x) & (b.values == y)).sum()) for y in (1, 0)] for x in (1, 0)]
        return "McNemar exact", float(mcnemar(table, exact=True).pvalue)
    from scipy.stats import ttest_1samp

    changes = _changes(a, b)
    if not np.isfinite(changes).all():
        return "paired t", 0.0 if np.isfinite(a.values).all() != np.isfinite(b.values).all() else 1.0
    if np.ptp(changes) == 0:  # no spread: the statistic is 0 / 0, or infinite
        return "paired t", float(changes[0] == 0)
    return "paired t", float(ttest_1samp(changes, 0.0).pvalue)


def _corrected(a: Sample, b: Sample) -> np.ndarray:
    """The differences that equivalence and sample sizes are reckoned from: see the sources above."""
    changes = _changes(a, b)
    return np.append(changes, [1.0, -1.0]) if _right_or_wrong(a, b) else changes


def _equivalence(changes: np.ndarray, margin: float) -> float:
    """p of the two one-sided tests that the mean lies within +- margin."""
    from statsmodels.stats.weightstats import DescrStatsW

    if margin <= 0:
        return 1.0
    if np.ptp(changes) == 0:
        return float(abs(changes[0]) >= margin)
    return float(DescrStatsW(changes).ttost_mean(-margin, margin)[0])


def _verdict(pair: Pair, test: str, p: float, holm: float, family: int, rules: Rules) -> Verdict:
    a, b = pair.mine, pair.other
    n, perplexity = len(a.values), a.lower_is_better
    broken = [sample for sample in (a, b) if not np.isfinite(sample.values).all()]
    if broken:
        return _broken(pair, test, p, holm, rules)
    found = stats.difference(a, b, rules.level)
    margin = rules.margin_ppl if perplexity else rules.margin_acc
    scaled = math.log1p(margin) if perplexity else margin  # in the units of the changes
    changes = _corrected(a, b)
    p_equal = _equivalence(changes, scaled)
    within = pair.noise is not None and abs(found.value) <= pair.noise
    significant = holm < rules.alpha and found.excludes_zero
    needed, why = None, ""
    identical = not np.any(a.values != b.values)
    if p_equal < rules.alpha or (identical and pair.remeasured):
        word = "equal"
        if identical:
            why = "identical"
        elif significant and not within:
            why = "a difference is there, and too small to matter"
    elif significant and not within:
        word = "better" if (found.value < 0) == perplexity else "worse"
    else:
        word = "undecided"
        needed = _needed(changes, scaled, n, family, rules, significant_is_enough=not within)
        unit = _unit(a)
        if needed:
            why = f"{'inside the noise floor; ' if within and significant else ''}about {needed:,} {unit} would decide"
        else:
            reason = ": inside the noise floor, and not inside the margin" if within else ""
            why = f"no number of {unit} would decide{reason}"
    return Verdict(word, a.score, b.score, found, test, p, holm, p_equal, margin * b.score if perplexity else margin,
                   pair.noise, n, needed, why)


def _broken(pair: Pair, test: str, p: float, holm: float, rules: Rules) -> Verdict:
    """Where a score is not a finite number: the one that is wins, and between two of them nothing is decided."""
    mine, other = (int((~np.isfinite(sample.values)).sum()) for sample in (pair.mine, pair.other))
    word = "undecided" if mine and other else "worse" if mine else "better"
    told = [f"{who} is not a finite number on {count} of {len(pair.mine.values)} {_unit(pair.mine)}"
            for who, count in (("the score", mine), ("the other's score", other)) if count]
    nowhere = Interval(math.nan, math.nan, math.nan)
    return Verdict(word, pair.mine.score, pair.other.score, nowhere, test, p, holm, 1.0, math.nan, pair.noise,
                   len(pair.mine.values), None, " and ".join(told))


def _needed(changes: np.ndarray, margin: float, n: int, family: int, rules: Rules, significant_is_enough: bool
            ) -> int | None:
    """Observations with which a difference like the one seen would be called better or worse, or equal, whichever is
    fewer, with the power of the rules; None: no number would."""
    from statsmodels.stats.power import normal_sample_size_one_tail

    mean, spread = abs(float(changes.mean())), float(changes.std(ddof=1))
    ways = []
    if significant_is_enough and mean > 0:  # at the strictest of Holm's levels
        ways.append(normal_sample_size_one_tail(mean, rules.power, rules.alpha / family / 2, spread))
    if mean < margin:  # both one-sided tests must reject
        ways.append(normal_sample_size_one_tail(margin - mean, (1 + rules.power) / 2, rules.alpha, spread))
    found = min((way for way in ways if way <= MOST), default=None)
    return None if found is None else max(n + 1, math.ceil(found))
