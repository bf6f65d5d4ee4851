"""Bootstrap intervals: values by hand, against a slow oracle, and by simulation."""

import time

import numpy as np
import pytest

from stoney_rl.errors import StoneyError
from stoney_rl.metrics import chrf, intervals
from stoney_rl.metrics.intervals import Difference, Interval


def chrf_counts(n, seed=0):
    """Plausible count rows without text: [row, order x (hypothesis, reference, match)]."""
    rng = np.random.default_rng(seed)
    length = rng.integers(8, 40, size=(n, 1)) - np.arange(8)
    match = rng.binomial(length, rng.uniform(0.2, 0.6, size=(n, 1)) ** np.arange(1, 9))
    return np.stack([length, length + 1, match], axis=-1).reshape(n, 24)


def test_mean_interval_values():
    found = intervals.mean_interval([1.0, None, 0.0, 1.0, 0.0, 1.0], seed=7, resamples=500)
    assert isinstance(found, Interval)
    assert (found.value, found.n, found.units, found.resamples, found.seed, found.confidence) == (
        0.6,
        5,
        5,
        500,
        7,
        0.95,
    )


def test_no_rows_is_none():
    assert intervals.mean_interval([], seed=0) is None
    assert intervals.mean_interval([None, None], seed=0) is None
    assert intervals.chrf_interval([], seed=0) is None
    assert intervals.mean_difference([None, 1.0], [1.0, None], seed=0) is None
    assert intervals.chrf_difference([], [], seed=0) is None


def test_one_row_and_constant_rows_are_not_certainty():
    one = intervals.mean_interval([1.0], seed=0, bounds=(0, 1))
    assert (one.low, one.high) == pytest.approx((0.025, 1.0))
    # Clopper-Pearson for 0 of 20, to four decimals in any table: 0 to 0.1684.
    none_right = intervals.mean_interval([0.0] * 20, seed=0, bounds=(0, 1))
    assert none_right.low == 0.0
    assert round(none_right.high, 4) == 0.1684
    unbounded = intervals.mean_interval([3.0] * 20, seed=0)
    assert (unbounded.value, unbounded.low, unbounded.high) == (3.0, None, None)
    perfect = intervals.chrf_interval(chrf.statistics(predictions=["tâlo"] * 20, references=["tâlo"] * 20), seed=0)
    assert (perfect.value, perfect.high) == (100.0, 100.0)
    assert round(perfect.low, 2) == 83.16


def test_constant_difference_is_the_sign_test():
    # Ten rows, all from wrong to right: two-sided sign test 2 / 2^10; low = 1 - 2 (1 - 0.025^(1/10)).
    found = intervals.mean_difference([0.0] * 10, [1.0] * 10, seed=0, bounds=(0, 1))
    assert found.p == pytest.approx(2 / 2**10)
    assert (found.low, found.high) == pytest.approx((1 - 2 * (1 - 0.025**0.1), 1.0))
    assert found.conclusive
    five = intervals.mean_difference([0.0] * 5, [1.0] * 5, seed=0, bounds=(0, 1))
    assert five.p == pytest.approx(2 / 2**5)
    assert five.low < 0
    assert not five.conclusive
    same = intervals.mean_difference([0.5] * 30, [0.5] * 30, seed=0, bounds=(0, 1))
    assert (same.value, same.p, same.conclusive) == (0.0, 1.0, False)


def test_fewer_than_five_units_have_no_interval():
    found = intervals.mean_interval([0.0, 1.0, 1.0, 0.0], seed=0, bounds=(0, 1))
    assert (found.value, found.low, found.high) == (0.5, None, None)
    assert intervals.mean_interval([0.0, 1.0, 1.0, 0.0, 1.0], seed=0, bounds=(0, 1)).low is not None


def test_few_units_are_never_conclusive():
    rows = [0.9, 0.8, 1.0, 0.9, 0.8, 1.0, 0.9, 0.8]
    few = intervals.mean_difference([0.0] * 8, rows, seed=0, bounds=(0, 1))
    assert few.low > 0
    assert not few.conclusive
    assert intervals.mean_difference([0.0] * 16, rows * 2, seed=0, bounds=(0, 1)).conclusive


def test_resampled_chrf_equals_scoring_the_drawn_rows_with_sacrebleu():
    from sacrebleu.metrics import CHRF

    rng = np.random.default_rng(5)
    words = ["tâlo", "mîva", "liẖtâlo", "nûfe", "you", "say"]
    predictions = [" ".join(rng.choice(words, size=4)) for _ in range(12)]
    references = [" ".join(rng.choice(words, size=4)) for _ in range(12)]
    counts = chrf.statistics(predictions=predictions, references=references)
    drawn = np.random.default_rng(11).integers(12, size=(20, 12))
    expected = [
        CHRF(word_order=2).corpus_score([predictions[i] for i in rows], [[references[i] for i in rows]]).score
        for rows in drawn
    ]
    assert intervals.resample(counts, chrf.score_from_counts, seed=11, resamples=20).tolist() == expected


def test_blocks_of_resamples_join_up(monkeypatch):
    values = intervals._value_and_count(np.arange(10.0))
    monkeypatch.setattr(intervals, "_DRAWS", 70)  # 7 resamples a block
    samples = intervals.resample(values, intervals._mean, seed=0, resamples=100)
    assert samples.shape == (100,)
    assert len(np.unique(samples)) > 30, "blocks must not repeat one another"
    assert abs(samples.mean() - 4.5) < 0.4


def test_same_seed_same_interval_whatever_numpy_did_before():
    values = list(np.linspace(0, 1, 40))
    np.random.seed(1)
    first = intervals.mean_interval(values, seed=4)
    np.random.seed(2)
    assert intervals.mean_interval(values, seed=4) == first
    assert intervals.mean_interval(values, seed=5) != first


def test_large_sample_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(size=2000)
    found = intervals.mean_interval(list(values), seed=0, resamples=4000)
    half = 1.96 * values.std(ddof=1) / 2000**0.5
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.08)


def test_few_rows_get_student_width():
    """At n = 8 the Student half-width is 2.365 s / sqrt(8); a plain percentile interval is about 22 % narrower."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        values = rng.normal(size=8)
        found = intervals.mean_interval(list(values), seed=0, resamples=4000)
        ratios.append((found.high - found.low) / (2 * 2.365 * values.std(ddof=1) / 8**0.5))
    assert 0.9 < np.mean(ratios) < 1.1


def test_coverage_of_a_mean():
    rng = np.random.default_rng(0)
    covered = {"binary": 0, "skewed": 0}
    for sim in range(200):
        for name, values, truth in (
            ("binary", (rng.random(100) < 0.3).astype(float), 0.3),
            ("skewed", rng.beta(0.5, 1.5, size=100), 0.25),
        ):
            found = intervals.mean_interval(list(values), seed=sim, resamples=500, bounds=(0, 1))
            covered[name] += found.low <= truth <= found.high
    assert 0.91 <= covered["binary"] / 200 <= 0.99
    assert 0.91 <= covered["skewed"] / 200 <= 0.99


@pytest.mark.parametrize("n", [10, 48])
def test_a_against_a_is_rejected_one_time_in_twenty(n):
    rng = np.random.default_rng(n)
    rejected = disagreed = 0
    for sim in range(200):
        a, b = rng.random(n), rng.random(n)
        found = intervals.mean_difference(list(a), list(b), seed=sim, resamples=999, bounds=(0, 1))
        rejected += found.conclusive
        disagreed += found.conclusive != (found.p <= 0.05)
    assert disagreed == 0, "the interval and p must tell the same story"
    assert rejected / 200 <= 0.10
    assert rejected / 200 >= 0.01


def test_a_against_a_for_chrf():
    rejected = disagreed = 0
    for sim in range(200):
        a, b = chrf_counts(50, seed=2 * sim), chrf_counts(50, seed=2 * sim + 1)
        swap = np.random.default_rng(sim).random((50, 1)) < 0.5
        found = intervals.chrf_difference(np.where(swap, a, b), np.where(swap, b, a), seed=sim, resamples=500)
        rejected += found.conclusive
        disagreed += found.conclusive != (found.p <= 0.05)
    assert disagreed == 0
    assert 0.01 <= rejected / 200 <= 0.10


def test_pairing_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(0)
    difficulty = rng.random(60)
    a, b = difficulty * 0.8, difficulty * 0.8 + 0.05 + 0.02 * rng.random(60)
    alone_a, alone_b = (intervals.mean_interval(list(x), seed=0, bounds=(0, 1)) for x in (a, b))
    assert alone_a.high > alone_b.low, "the single intervals overlap"
    found = intervals.mean_difference(list(a), list(b), seed=0, bounds=(0, 1))
    assert isinstance(found, Difference)
    assert found.conclusive
    assert found.value == pytest.approx(b.mean() - a.mean())


def test_swapping_systems_mirrors_the_difference():
    a, b = chrf_counts(40, seed=1), chrf_counts(40, seed=2)
    one, other = (intervals.chrf_difference(*pair, seed=0) for pair in ((a, b), (b, a)))
    assert (one.value, one.low, one.high, one.p) == pytest.approx((-other.value, -other.high, -other.low, other.p))


def test_clusters_of_identical_rows_widen_by_the_root_of_their_size():
    rng = np.random.default_rng(0)
    each = rng.random(100)
    values, labels = np.repeat(each, 4), np.repeat(np.arange(100), 4)
    rows = intervals.mean_interval(list(values), seed=0)
    clustered = intervals.mean_interval(list(values), seed=0, clusters=labels.tolist())
    assert (rows.n, rows.units, clustered.n, clustered.units) == (400, 400, 400, 100)
    assert clustered.value == rows.value
    assert (clustered.high - clustered.low) / (rows.high - rows.low) == pytest.approx(2.0, rel=0.12)
    # Four copies of a row in a cluster are exactly as sure as one row.
    alone = intervals.mean_interval(list(each), seed=0)
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high))
    counts = chrf_counts(100)
    repeated = np.repeat(counts, 4, axis=0)
    narrow = intervals.chrf_interval(repeated, seed=0)
    wide = intervals.chrf_interval(repeated, seed=0, clusters=labels.tolist())
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.0, rel=0.12)


def test_clusters_are_summed():
    sums = intervals._sum_by_cluster(np.array([[1.0, 1], [2, 1], [5, 1]]), ["a", "b", "a"])
    assert sums.tolist() == [[6.0, 2.0], [2.0, 1.0]]
    # Pairs of one right and one wrong: every cluster has mean 0.5, whichever are drawn.
    paired = intervals.mean_interval([1.0, 0.0] * 30, seed=0, clusters=[i // 2 for i in range(60)])
    assert (paired.value, paired.low, paired.high) == (0.5, None, None)


def test_none_rows_leave_their_clusters():
    found = intervals.mean_interval([0.2, None, 0.4, None], seed=0, clusters=["a", "a", "b", "c"])
    assert (found.n, found.units, found.value) == (2, 2, pytest.approx(0.3))


def test_unequal_clusters_weigh_rows():
    found = intervals.mean_interval([1.0, 1.0, 1.0, 0.0], seed=0, clusters=["a", "a", "a", "b"])
    assert found.value == 0.75


def test_thousand_rows_in_seconds():
    counts = chrf_counts(1000)
    start = time.process_time()
    found = intervals.chrf_difference(counts, chrf_counts(1000, seed=1), seed=0, resamples=2000)
    assert found.n == 1000
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: intervals.mean_interval([1.0, 2.0], seed=0, bounds=(0, 1)), "expected 0 to 1"),
        (lambda: intervals.mean_interval([1.0, float("nan")], seed=0), "finite numbers or None"),
        (lambda: intervals.mean_interval([1.0, 0.0], seed=0, clusters=["a"]), "1 labels for 2 rows"),
        (lambda: intervals.mean_interval([1.0], seed=None), "seed: expected an integer"),
        (lambda: intervals.mean_interval([1.0], seed=0, resamples=10), "at least 100"),
        (lambda: intervals.mean_interval([1.0], seed=0, confidence=95), "confidence"),
        (lambda: intervals.mean_difference([1.0], [1.0, 0.0], seed=0), "1 against 2 values"),
        (lambda: intervals.chrf_interval([[1, 2, 3]], seed=0), "expected an array [row, 24], got [1, 3]"),
        (lambda: intervals.chrf_interval(chrf_counts(3), seed=0, clusters=[1]), "1 labels for 3 rows"),
        (lambda: intervals.chrf_difference(chrf_counts(3), chrf_counts(2), seed=0), "3 rows against 2"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(StoneyError) as error:
        call()
    assert words in str(error.value)
