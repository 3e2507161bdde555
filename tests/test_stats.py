"""The statistics against scipy, closed forms, and simulated truth."""

import numpy as np
import pytest
from scipy import stats as reference

from suite import stats
from suite.stats import Sample


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_standard_error_is_scipys(random):
    outcomes = random.integers(0, 2, 200)
    assert stats.standard_error("".join(map(str, outcomes))) == pytest.approx(reference.sem(outcomes))


def test_perplexity_of_uneven_windows():
    """exp of all NLL over all tokens, not a mean of windows."""
    assert Sample.windows([2.0, 9.0], [1, 3]).score == pytest.approx(np.exp(11 / 4))


def test_interval_of_a_mean_is_the_normal_one(random):
    """For many documents the percentile bootstrap and the normal approximation agree."""
    outcomes = (random.uniform(size=2000) < 0.7).astype(int)
    found, half = stats.interval(Sample.documents(outcomes)), 1.96 * reference.sem(outcomes)
    assert found.value == pytest.approx(outcomes.mean())
    assert found.low == pytest.approx(outcomes.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(outcomes.mean() + half, abs=0.1 * half)


def test_interval_of_a_perplexity_by_the_delta_method(random):
    nll = random.normal(700, 60, 400)
    found = stats.interval(Sample.windows(nll, 500))
    half = 1.96 * found.value * reference.sem(nll / 500)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_pairing_sees_what_separate_intervals_do_not(random):
    """A loss of 0.2 % that all windows share, far inside the spread of the windows."""
    nll = random.normal(700, 100, 100)
    a, b = Sample.windows(nll, 500), Sample.windows(nll + random.normal(1, 0.5, 100), 500)
    assert stats.interval(b).low < stats.interval(a).value < stats.interval(b).high
    assert stats.better(a, b) and not stats.better(b, a)


def test_equal_variants_are_not_told_apart():
    a = Sample.documents("0110" * 20)
    assert not stats.better(a, a)
    found = stats.difference(a, a)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_better_knows_the_direction():
    worse, right = Sample.documents("0" * 30 + "1" * 70), Sample.documents("0" * 5 + "1" * 95)
    assert stats.better(right, worse) and not stats.better(worse, right)


def test_false_alarms_stay_near_five_percent(random, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    alarms = 0
    for _ in range(200):
        shared = random.uniform(size=150)
        a, b = (Sample.documents(((shared + random.normal(0, 0.2, 150)) > 0.4).astype(int)) for _ in range(2))
        alarms += stats.difference(a, b).excludes_zero
    assert alarms <= 20  # 200 x 5 % = 10, and three standard deviations


def test_too_few_observations_decide_nothing():
    few = stats.MINIMUM - 1
    a, b = Sample.windows([1.0] * few, 1), Sample.windows([9.0] * few, 1)
    assert not stats.better(a, b) and not stats.difference(a, b).excludes_zero
    assert np.isnan(stats.interval(a).low)


def test_seeded(random):
    a, b = Sample.documents(random.integers(0, 2, 80)), Sample.documents(random.integers(0, 2, 80))
    assert stats.difference(a, b) == stats.difference(a, b)
    assert stats.difference(a, b, seed=1) != stats.difference(a, b)


def test_a_mean_over_tasks_weighs_tasks_alike():
    good, bad = Sample.documents("1" * 40), Sample.documents("0" * 400)
    found = stats.mean_difference([(good, Sample.documents("0" * 40)), (bad, bad)])
    assert found.value == 0.5 and found.low == found.high == 0.5


@pytest.mark.parametrize("other", [Sample.documents("01" * 8), Sample.windows([1.0] * 20, 1),
                                   Sample.documents("01" * 11)])
def test_unpaired_samples_are_refused(other):
    with pytest.raises(ValueError, match="same windows or documents"):
        stats.difference(Sample.documents("01" * 10), other)
