"""How sure is a score, and is a difference more than chance? Bootstrap over test rows, by cluster where they depend.

1. Every score here is a function of sums over rows (a mean: value and count; chrF++: 24 n-gram counts), so one resample
   is a weighted sum of rows: all resamples are one matrix product.
2. Rows about one lexeme are right or wrong together. With ``clusters`` whole clusters are drawn, not rows; without it
   such rows would be counted as independent and the interval would be too narrow.
3. Percentile interval with the tail widened for few units: the tail is Phi(-sqrt(n/(n-1)) t) with t the Student
   quantile on n-1 degrees of freedom (the 'expanded percentile' interval, Hesterberg 2015, The American Statistician
   69(4), section 5.3). The plain one covers too little: about 90 % instead of 95 % at n = 10; at n = 100 they agree.
4. Two systems are compared on the same resamples (paired bootstrap, Koehn 2004, https://aclanthology.org/W04-3250).
   The two-sided p inverts the interval: p <= 0.05 exactly when the 95 % interval excludes zero.
5. When every resample gives the same value (0 of 20 right), the bootstrap would claim certainty. Where the score has
   ``bounds``, the interval is then the exact binomial one: with n equal units, at most a share
   1 - (alpha/2)^(1/n) of other units could have gone unnoticed (Clopper and Pearson 1934), and those could lie at a
   bound. Where it has none, low and high are None.
6. With fewer than five units the tail of step 3 lies beyond what resampling them can show: low and high are None.
7. Of several tests some come out by chance: ``randomisation_p`` of each, and ``holm`` over all of them, decide.

The interval covers the choice of test rows. It does not cover another training seed.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from stoney_rl.errors import StoneyError

RESAMPLES = 2000
TRIALS = 10_000  # of approximate randomisation, as sacreBLEU
POWER = 0.8  # the chance to find a difference of the detectable size
CONFIDENCE = 0.95
# Below this many units no difference is called conclusive: the simulation in tests/test_intervals.py.
MIN_UNITS = 10
_DRAWS = 2**22  # draws held at once, about 64 MB


@dataclass(frozen=True)
class Interval:
    """A score and its interval, in the score's own unit. low and high are None where the rows can't tell."""

    value: float
    low: float | None
    high: float | None
    n: int  # rows scored
    resamples: int
    seed: int
    confidence: float = CONFIDENCE
    units: int = 0  # what was resampled: clusters, or rows where there are none


@dataclass(frozen=True)
class Difference(Interval):
    """System b minus system a on the same rows. p is two-sided."""

    p: float = 1.0

    @property
    def conclusive(self) -> bool:
        """True if the interval excludes zero and rests on at least ``MIN_UNITS`` units."""
        return self.units >= MIN_UNITS and self.low is not None and (self.low > 0 or self.high < 0)


def mean_interval(
    values: Sequence[float | None],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Interval | None:
    """Interval of the mean of per-row ``values``; rows with None are left out. None if no row has a value.

    ``clusters``: one label for each row. ``bounds``: the least and greatest value a row can have, e.g. (0, 1).
    Raises StoneyError for values outside the bounds or not finite, labels that don't fit the rows, and arguments
    out of range.
    """
    values, clusters = _scored([values], clusters)
    _check_bounds(values[0], bounds)
    return _interval(_value_and_count(values[0]), _mean, seed, resamples, confidence, clusters, bounds)


def statistic_interval(
    statistics,
    score: Callable,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Interval | None:
    """Interval of ``score`` of the summed ``statistics`` [row, k]; ``score`` maps [..., k] to [...]. None without rows."""
    return _interval(_array(statistics), score, seed, resamples, confidence, clusters, bounds)


def chrf_interval(
    statistics,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
) -> Interval | None:
    """Interval of corpus chrF++ (0-100) from ``chrf.statistics`` [row, 24]. None if there is no row."""
    from stoney_rl.metrics.chrf import score_from_counts

    counts = _counts(statistics)
    return _interval(counts, score_from_counts, seed, resamples, confidence, clusters, (0.0, 100.0))


def mean_difference(
    values_a: Sequence[float | None],
    values_b: Sequence[float | None],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Difference | None:
    """Mean of b minus mean of a over the rows that both have scored, with interval and two-sided p.

    ``values_a[i]`` and ``values_b[i]`` are the same row; ``bounds`` are those of one value. None if no row is scored
    by both. Raises StoneyError as ``mean_interval``.
    """
    (a, b), clusters = _scored([values_a, values_b], clusters)
    _check_bounds(a, bounds)
    _check_bounds(b, bounds)
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return _difference(_value_and_count(b - a), _mean, seed, resamples, confidence, clusters, span)


def statistic_difference(
    statistics_a,
    statistics_b,
    score: Callable,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Difference | None:
    """``score`` of b minus that of a, each of summed statistics [row, k] on the same rows in one order.

    ``score`` maps [..., k] to [...], ``bounds`` are the least and greatest that it can be. None without rows; raises
    StoneyError for different numbers of rows.
    """
    rows, difference = _paired(statistics_a, statistics_b, score)
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return _difference(rows, difference, seed, resamples, confidence, clusters, span)


def chrf_difference(
    statistics_a,
    statistics_b,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    clusters: Sequence[Hashable] | None = None,
) -> Difference | None:
    """Corpus chrF++ of b minus that of a, both [row, 24] on the same rows in one order. None if there is no row."""
    from stoney_rl.metrics.chrf import score_from_counts

    return statistic_difference(
        _counts(statistics_a),
        _counts(statistics_b),
        score_from_counts,
        seed=seed,
        resamples=resamples,
        confidence=confidence,
        clusters=clusters,
        bounds=(0.0, 100.0),
    )


def randomisation_p(
    statistics_a,
    statistics_b,
    score: Callable,
    *,
    seed: int,
    trials: int = TRIALS,
    clusters: Sequence[Hashable] | None = None,
) -> float | None:
    """Two-sided p of the difference of two systems by approximate randomisation; arguments as ``statistic_difference``.

    If it did not matter which system gave which answer, the two could be swapped: in each trial the rows of every
    cluster are, all or none, with probability 1/2. p = (c + 1) / (trials + 1) with c the trials whose difference is at
    least as large as the one seen (Noreen 1989; Riezler and Maxwell 2005, https://aclanthology.org/W05-0908). For rows
    that are each their own cluster, draws and p are those of sacreBLEU's paired_ar with the same seed, but for ties:
    sacreBLEU counts larger differences alone, so that equal systems would have the least p there is; here they have 1.
    One byte of memory for each trial and cluster.
    """
    import numpy as np

    rows, difference = _paired(statistics_a, statistics_b, score)
    by_unit = _sum_by_cluster(rows, clusters)
    units, width = len(by_unit), rows.shape[1] // 2
    if not units:
        return None
    a, b = by_unit[:, :width], by_unit[:, width:]
    kept = np.random.default_rng(seed).integers(2, size=(trials, units), dtype=bool)
    total = by_unit.sum(axis=0)
    both = total[:width] + total[width:]
    seen = abs(difference(total))
    as_large, block = 0, max(1, _DRAWS // units)
    for start in range(0, trials, block):
        first = kept[start : start + block].astype(np.float64) @ (a - b) + b.sum(axis=0)
        found = np.abs(difference(np.hstack([first, both - first])))
        as_large += int((found >= seen - 1e-9 * max(1.0, seen)).sum())
    return (as_large + 1) / (trials + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """Step-down corrected p values, in order: the chance of one false finding or more among all stays below a level.

    Holm 1979, Scandinavian Journal of Statistics 6(2), 65-70.
    """
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, ps[index] * (len(ps) - rank)))
        corrected[index] = highest
    return corrected


def detectable_difference(
    statistics_a,
    statistics_b,
    score: Callable,
    *,
    seed: int,
    alpha: float = 0.05,
    power: float = POWER,
    simulations: int = RESAMPLES,
    clusters: Sequence[Hashable] | None = None,
) -> float | None:
    """The smallest true difference that a test of level ``alpha`` would find with probability ``power`` at this n.

    Arguments as ``statistic_difference``. Each cluster's share of the difference (its jackknife pseudo-value: Efron and
    Tibshirani 1993, chapter 11), less their mean, is what differences are made of when there is none. ``simulations``
    sets of as many are drawn from these; a set with mean m and standard error s would reject, after a shift by d, if
    m + d > t s, with t the Student quantile of 1 - alpha/2. The d that is wanted is the ``power`` quantile of t s - m.
    For normal differences that is Bloom's minimum detectable effect (1995, Evaluation Review 19(5)), (t + z) s with z
    the normal quantile of ``power``. It rests on the spread of the differences seen, never on their mean.
    None with fewer than ``MIN_UNITS`` clusters, or where all differences are the same: they show no spread.
    """
    import numpy as np
    from scipy.special import stdtrit

    rows, difference = _paired(statistics_a, statistics_b, score)
    by_unit = _sum_by_cluster(rows, clusters)
    n = len(by_unit)
    if n < MIN_UNITS:
        return None
    total = by_unit.sum(axis=0)
    shares = n * difference(total) - (n - 1) * difference(total - by_unit)
    shares = shares - shares.mean()
    if np.ptp(shares) <= 1e-9 * max(1.0, abs(float(difference(total)))):
        return None

    def needed(sums):
        mean = sums[..., 0] / n
        variance = np.maximum(sums[..., 1] / n - mean**2, 0) / (n - 1)
        return stdtrit(n - 1, 1 - alpha / 2) * np.sqrt(variance) - mean

    moments = np.stack([shares, shares**2], axis=-1)
    return float(np.quantile(resample(moments, needed, seed=seed, resamples=simulations), power))


def resample(sums_by_unit, score: Callable, *, seed: int, resamples: int, size: int | None = None):
    """Scores of ``resamples`` bootstrap resamples: [unit, k] sums -> [resamples, ...] scores.

    ``size`` units are drawn with replacement, by default as many as there are; ``score`` maps summed [..., k] to [...].
    """
    import numpy as np

    units = len(sums_by_unit)
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS // units)
    scores = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        draws = rng.integers(units, size=(rows, size or units)) + units * np.arange(rows)[:, None]
        times_drawn = np.bincount(draws.ravel(), minlength=rows * units).reshape(rows, units)
        scores.append(score(times_drawn.astype(np.float64) @ sums_by_unit))
    return np.concatenate(scores)


def _interval(rows, score, seed, resamples, confidence, clusters, bounds, difference=False):
    import numpy as np

    _check_arguments(seed, resamples, confidence)
    by_unit = _sum_by_cluster(rows, clusters)
    if len(by_unit) == 0:
        return None
    value = float(score(rows.sum(axis=0)))
    samples = np.sort(resample(by_unit, score, seed=seed, resamples=resamples))
    p = 1.0
    if np.ptp(samples) <= 1e-9 * max(1.0, abs(value)):
        low, high = _exact_bounds(value, len(by_unit), confidence, bounds)
        if difference and bounds is not None:
            p = _exact_p(value, len(by_unit), bounds)
    else:
        # Order statistics, not interpolated quantiles, so that the interval and p can't disagree.
        k = int((resamples + 1) * _tail(confidence, len(by_unit)) + 1e-9)
        low, high = (float(samples[k - 1]), float(samples[-k])) if k else (None, None)
        if difference:
            at_or_beyond = min((samples <= 0).sum(), (samples >= 0).sum())
            p = _two_sided_p((at_or_beyond + 1) / (resamples + 1), len(by_unit))
    common = (value, low, high, len(rows), resamples, seed, confidence, len(by_unit))
    return Difference(*common, p=p) if difference else Interval(*common)


def _difference(*arguments):
    return _interval(*arguments, difference=True)


def _tail(confidence, units):
    """The share of resamples cut off at each end: (1 - confidence) / 2, less for few units (Hesterberg 2015)."""
    from scipy.special import ndtr, stdtrit

    return float(ndtr((units / (units - 1)) ** 0.5 * stdtrit(units - 1, (1 - confidence) / 2)))


def _two_sided_p(tail, units):
    """The p whose interval just touches zero: the inverse of ``_tail``, doubled for two sides."""
    from scipy.special import ndtri, stdtr

    return min(1.0, 2 * float(stdtr(units - 1, ndtri(min(tail, 0.5)) * ((units - 1) / units) ** 0.5)))


def _exact_bounds(value, units, confidence, bounds):
    if bounds is None:
        return None, None
    unnoticed = 1 - ((1 - confidence) / 2) ** (1 / units)
    return value - (value - bounds[0]) * unnoticed, value + (bounds[1] - value) * unnoticed


def _exact_p(value, units, bounds):
    """The level at which ``_exact_bounds`` of a difference just reach zero: 1 for no difference."""
    if value == 0:
        return 1.0
    far = bounds[0] if value > 0 else bounds[1]
    return min(1.0, 2 * (far / (far - value)) ** units)


def _mean(sums):
    return sums[..., 0] / sums[..., 1]


def _value_and_count(values):
    import numpy as np

    return np.stack([values, np.ones_like(values)], axis=-1)


def _scored(columns, clusters):
    """Float arrays of the rows where every column has a value, and the labels of those rows."""
    import numpy as np

    sizes = {len(column) for column in columns}
    if len(sizes) != 1:
        raise StoneyError(
            f"paired rows: {' against '.join(str(len(c)) for c in columns)} values: expected the same rows"
        )
    size = sizes.pop()
    if clusters is not None and len(clusters) != size:
        raise StoneyError(f"clusters: {len(clusters)} labels for {size} rows: expected one label for each row")
    kept = [row for row in range(size) if all(column[row] is not None for column in columns)]
    arrays = [np.array([column[row] for row in kept], dtype=np.float64) for column in columns]
    for array in arrays:
        if not np.isfinite(array).all():
            raise StoneyError(
                "values: expected finite numbers or None, got NaN or infinity; use None for unscored rows"
            )
    return arrays, None if clusters is None else [clusters[row] for row in kept]


def _paired(statistics_a, statistics_b, score):
    """[row, 2k] of both systems' statistics, and the difference of their scores as a function of sums of it."""
    import numpy as np

    a, b = _array(statistics_a), _array(statistics_b)
    if a.shape != b.shape:
        raise StoneyError(f"paired statistics: {len(a)} rows against {len(b)}: expected the same rows in one order")
    width = a.shape[1]
    return np.hstack([a, b]), lambda sums: score(sums[..., width:]) - score(sums[..., :width])


def _array(statistics):
    import numpy as np

    found = np.asarray(statistics, dtype=np.float64)
    if found.ndim != 2 and found.size:
        raise StoneyError(f"statistics: expected an array [row, k], got {list(found.shape)}")
    return found.reshape(len(found), -1) if found.size else found.reshape(0, 0)


def _counts(statistics):
    import numpy as np

    from stoney_rl.metrics.chrf import COUNTS

    counts = np.asarray(statistics, dtype=np.float64)
    if counts.size == 0:
        return np.zeros((0, COUNTS))
    if counts.ndim != 2 or counts.shape[1] != COUNTS:
        raise StoneyError(f"chrF++ statistics: expected an array [row, {COUNTS}], got {list(counts.shape)}")
    return counts


def _sum_by_cluster(rows, clusters):
    """[row, k] -> [cluster, k], clusters in order of first appearance; the rows themselves without labels."""
    import numpy as np

    if clusters is None:
        return rows
    if len(clusters) != len(rows):
        raise StoneyError(f"clusters: {len(clusters)} labels for {len(rows)} rows: expected one label for each row")
    index = {label: position for position, label in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(index), rows.shape[1]))
    np.add.at(sums, [index[label] for label in clusters], rows)
    return sums


def _check_bounds(values, bounds):
    if bounds is not None and len(values) and not (bounds[0] <= values.min() and values.max() <= bounds[1]):
        raise StoneyError(f"values: from {values.min():g} to {values.max():g}, expected {bounds[0]:g} to {bounds[1]:g}")


def _check_arguments(seed, resamples, confidence):
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise StoneyError(f"seed: expected an integer of at least 0, got {seed!r}")
    if not isinstance(resamples, int) or resamples < 100:
        raise StoneyError(f"resamples: expected at least 100, got {resamples!r}; 1,000 to 2,000 are usual")
    if not 0.5 <= confidence < 1:
        raise StoneyError(f"confidence: expected a share from 0.5 to below 1 such as 0.95, got {confidence!r}")
