"""Verdicts against scipy, closed forms and simulated truth; false alarms and planted losses on the committed records."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as reference

from suite import stats, verdict
from suite.errors import PTQError
from suite.report.data import Score
from suite.stats import Sample
from suite.store import Store
from suite.verdict import Pair, Rules, judge

RESULTS = Path(__file__).resolve().parent.parent / "results"
STORED = "tiny-llama-s"


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def quick(monkeypatch):
    """For hundreds of comparisons: fewer draws, and none of the whole heap's searches that statsmodels ends with."""
    monkeypatch.setattr(stats, "RESAMPLES", 300)
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def windows(random, n=100, loss=0.0, noise=1.0):
    """A pair of n windows of 511 tokens: the first has lost `loss` of its perplexity."""
    nll = random.normal(300, 10, n)
    return Sample.windows(nll + 511 * np.log1p(loss) + random.normal(0, noise, n), 511), Sample.windows(nll, 511)


def documents(both=100, first=0, second=0, neither=50):
    """A pair of right-or-wrong outcomes: right in both, in the first alone, in the second alone, in neither."""
    return (Sample.documents([1] * both + [1] * first + [0] * second + [0] * neither),
            Sample.documents([1] * both + [0] * first + [1] * second + [0] * neither))


def one(a, b, noise=None, rules=verdict.RULES):
    return judge([Pair(a, b, noise)], rules)[0]


# ---------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("first, second", [(0, 0), (1, 0), (3, 9), (20, 5)])
def test_right_and_wrong_by_mcnemars_exact_test(first, second):
    found = one(*documents(first=first, second=second))
    expected = reference.binomtest(first, first + second).pvalue if first + second else 1
    assert found.test == "McNemar exact" and found.p == pytest.approx(expected)


def test_perplexities_by_the_paired_t_test(random):
    a, b = windows(random, loss=0.0005)
    assert one(a, b).p == pytest.approx(reference.ttest_rel(a.values, b.values).pvalue)
    scores = Sample.documents(random.uniform(size=40)), Sample.documents(random.uniform(size=40))
    assert one(*scores).p == pytest.approx(reference.ttest_rel(*(s.values for s in scores)).pvalue)


def test_holm_over_all_pairs_of_the_comparison(random):
    pairs = [Pair(*windows(random, loss=loss)) for loss in (0, 0.0004, 0.0006, 0.01)]
    found = judge(pairs)
    largest, expected = 0.0, {}
    for rank, v in enumerate(sorted(found, key=lambda v: v.p)):
        largest = max(largest, min(1.0, v.p * (len(found) - rank)))
        expected[v.p] = largest
    assert [v.p_holm for v in found] == pytest.approx([expected[v.p] for v in found])


def test_equivalence_is_two_one_sided_t_tests(random):
    a, b = windows(random, loss=0.0003)
    changes = (a.values - b.values) / 511
    margin = np.log1p(0.001)
    expected = max(reference.ttest_1samp(changes, -margin, alternative="greater").pvalue,
                   reference.ttest_1samp(changes, margin, alternative="less").pvalue)
    assert one(a, b).p_equal == pytest.approx(expected)


def test_few_equal_answers_prove_no_equality():
    """Bonett and Price: one pseudo-observation each way. Without it the spread, and so p, would be 0."""
    assert one(*documents(both=10, neither=10)).word == "undecided"
    assert one(*documents(both=200, neither=100)).word == "equal"
    again = judge([Pair(*documents(both=10, neither=10), remeasured=True)])[0]  # whether it moved needs no test
    assert (again.word, again.why) == ("equal", "identical")
    assert judge([Pair(*documents(both=10, first=1), remeasured=True)])[0].word == "undecided"


# ---------------------------------------------------------------------------------------------- words


def test_words(random):
    a, b = windows(random, loss=0.01)
    assert one(a, b).word == "worse" and one(b, a).word == "better"
    right, wrong = documents(first=30, second=2)
    assert one(right, wrong).word == "better" and one(wrong, right).word == "worse"
    same = one(b, b)
    assert (same.word, same.why) == ("equal", "identical") and same.difference.value == 0
    assert one(*windows(random, noise=20)).word == "undecided"


def test_a_sure_difference_inside_the_margin_is_equal(random):
    a, b = windows(random, loss=0.003, noise=0.5)
    assert one(a, b).word == "worse"
    found = one(a, b, rules=Rules(margin_ppl=0.01))
    assert found.word == "equal" and "too small to matter" in found.why
    assert one(a, b, rules=Rules(margin_ppl=0)).word == "worse"


def test_nothing_is_equal_without_a_margin(random):
    a, _ = windows(random)
    assert one(a, a, rules=Rules(margin_ppl=0)).word == "undecided"


@pytest.mark.parametrize("share, word", [(0.5, "worse"), (0.999, "worse"), (1.0, "undecided"), (3.0, "undecided")])
def test_a_difference_inside_the_noise_floor_is_never_significant(random, share, word):
    a, b = windows(random, loss=0.01)
    found = one(a, b, noise=share * (a.score - b.score))
    assert found.word == word and found.within_noise == (word == "undecided")
    assert found.needed is None and ("inside the noise floor" in found.why) == (word == "undecided")


def test_holm_makes_the_verdict_stricter(random):
    a, b = documents(first=9, second=1)  # p = 0.021
    calm = [Pair(*windows(random, noise=20)) for _ in range(9)]
    assert one(a, b).word == "better" and judge([Pair(a, b), *calm])[0].word == "undecided"


def test_a_score_that_is_no_number_is_worse(random):
    a, b = windows(random)
    broken = Sample.windows([float("nan")] * 3 + list(a.values[3:]), 511)
    found = one(broken, b)
    assert found.word == "worse" and "3 of 100 windows" in found.why
    assert one(b, broken).word == "better" and one(broken, broken).word == "undecided"


# ---------------------------------------------------------------------------------------------- how many would decide


def test_as_many_windows_as_told_decide(random, quick):
    """With `needed` windows, of the same mean and spread, about 80 % of comparisons come to a decision."""
    nll = random.normal(300, 10, 40)
    change = random.normal(0, 1.0, 40)
    change = 0.6 + 2.0 * (change - change.mean()) / change.std(ddof=1)  # 0.12 % of the perplexity, much spread
    found = one(Sample.windows(nll + change, 511), Sample.windows(nll, 511))
    assert found.word == "undecided" and 80 < found.needed < 130
    decided = 0
    for _ in range(100):
        nll = random.normal(300, 10, found.needed)
        decided += one(Sample.windows(nll + random.normal(0.6, 2.0, found.needed), 511),
                       Sample.windows(nll, 511)).word != "undecided"
    assert 65 <= decided <= 95


def test_more_is_needed_than_there_is(random):
    few, many = (one(*windows(random, n=n, noise=20)) for n in (20, 200))
    assert few.needed > 20 and many.needed > 200
    assert f"about {few.needed:,} windows would decide" in few.why


# ---------------------------------------------------------------------------------------------- mistakes


def test_unpaired_samples_are_refused():
    with pytest.raises(PTQError, match=r"task x: .* not measured on the same documents \(20 and 22\)"):
        judge([Pair(Sample.documents("01" * 10), Sample.documents("01" * 11), name="task x")])


def test_too_few_documents():
    few = Sample.documents("01" * 4)
    with pytest.raises(PTQError, match="task x has 8 documents: .* at least 10; raise --limit"):
        judge([Pair(few, few, name="task x")])


@pytest.mark.parametrize("options, words", [({"level": 1.0}, "level is 1.0"), ({"level": 0.2}, "level is 0.2"),
                                            ({"margin_ppl": -0.1}, "margin_ppl is -0.1"),
                                            ({"margin_acc": 1}, "margin_acc is 1"), ({"power": 2}, "power is 2")])
def test_rules_out_of_range(options, words):
    with pytest.raises(PTQError, match=words):
        Rules(**options)


def test_nothing_to_judge():
    assert judge([]) == []


# ---------------------------------------------------------------------------------------------- on stored records


@pytest.fixture(scope="module")
def stored():
    """label -> task -> what the committed records of a model hold, for variants that have every task."""
    found = {}
    for record in Store(RESULTS).records(model=STORED, kind="evaluation"):
        identity = record.identity
        if identity["scheme"] in (None, "W4A8 g128") and identity["task"]["limit"] is None:
            found.setdefault(record.result["label"], {})[identity["task"]["name"]] = Score(record).sample
    most = max(map(len, found.values()))
    return {label: samples for label, samples in sorted(found.items()) if len(samples) == most}


def twins(a, b, random):
    """Two samples that differ by chance alone, as much as a and b do: each window or document, drawn anew, is given to
    one or the other by the toss of a coin."""
    drawn, heads = random.integers(0, len(a.values), len(a.values)), random.integers(0, 2, len(a.values)) == 1
    x, y, weights = a.values[drawn], b.values[drawn], a.weights[drawn]
    return Sample(np.where(heads, x, y), weights, a.kind), Sample(np.where(heads, y, x), weights, a.kind)


def test_false_alarms(stored, random, quick):
    """200 comparisons of identical methods over all tasks, without a noise floor: at most 5 % are not "no difference"."""
    pairs, alarms = list(itertools.combinations(stored, 2)), 0
    assert len(pairs) >= 10
    for _ in range(200):
        first, second = pairs[random.integers(len(pairs))]
        common = [task for task in stored[first] if task in stored[second]]
        found = judge([Pair(*twins(stored[first][task], stored[second][task], random)) for task in common])
        alarms += any(v.word in ("better", "worse") for v in found)
    assert alarms <= 10


def test_a_planted_loss_of_one_percent_is_found(stored):
    """Of perplexity, on both embedded corpora, in windows that differ as those of two methods do."""
    full, other = stored["fp16"], stored["gptq"]
    corpora = [task for task in full if full[task].kind == "perplexity"]
    assert len(corpora) == 2
    pairs = []
    for task in corpora:
        a, b = full[task], other[task]
        spread = (b.values - a.values) - (b.values - a.values).mean()
        planted = Sample.windows(a.values + spread + a.weights * np.log(1.01), a.weights)
        assert planted.score == pytest.approx(1.01 * a.score)
        pairs.append(Pair(planted, a, noise=0.005 * a.score))
    assert [v.word for v in judge(pairs)] == ["worse", "worse"]
