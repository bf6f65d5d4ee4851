"""Many tests at once: which heads, layers or neurons have an effect that is more than chance?

    one, other = halves(clusters, seed=0)                     # rows; no cluster in both
    top = np.abs(values[one].mean(axis=0)).argsort()[-20:]    # choose on one half, report on the other
    result = effects(values[other][:, top], clusters[other], seed=0, floor=random_floor(values_of_random_models))
    result.mean, result.low, result.high, result.q, result.found

1. Values are one an example, [n, ...]; examples about one lexeme are one cluster, and clusters are what is resampled.
2. Interval: bootstrap-t over clusters (Efron and Tibshirani 1993, chapter 12.5). Percentiles of the mean itself, which
   do for one score, reach too little far out where few clusters are skewed, and among a thousand heads the far tail
   decides. Resamples have half as many clusters as there are (m out of n, Bickel, Goetze and van Zwet 1997): cautious,
   as a sample that by chance lacks its large values looks surer of itself than it is.
3. p: the larger of two. Sign flips of whole clusters (Fisher 1935; every pattern where there are few clusters) are exact
   where values scatter evenly around zero, but find what isn't there where they don't; the bootstrap-t sees the skewness.
   In 96 columns of 20 clusters of skewness 2, without any effect, sign flips alone found something in 44 of 200 runs,
   both in 7 (tests/test_interp_significance.py, slow). A few clusters that outweigh all others still mislead both: for
   that there is the floor.
4. q: Benjamini and Hochberg 1995 over all columns that are passed in: pass all that were looked at.
5. Found: q <= 0.05, and |mean| above the floor, the largest that models of the same shape with random weights gave. One
   such model says that little; with 19 a further random one exceeds the floor of the others once in 20.
6. With fewer than ten clusters nothing is found, and ``note`` says so.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from stoney_rl.errors import StoneyError
from stoney_rl.metrics.intervals import CONFIDENCE, MIN_UNITS, resample

LEVEL = 0.05  # of q: the share of findings that may be false
TRIALS = 10_000  # sign flips and resamples, at least
SHARE = 0.5  # of the clusters, in a resample
_CELLS = 2**24  # numbers held at once, 128 MB


@dataclass(frozen=True)
class Effects:
    """Of each column, in the shape [...] of one example's values; ``low`` to ``q`` are None with too few clusters.

    ``low``, ``high``: 95 % interval; NaN for a column in which all clusters have the same mean, which shows no spread to
    go by. ``p`` two-sided, for one column alone; ``q`` corrected for all of them; ``found`` bool. ``floor``: what |mean|
    had to exceed (0 if none was given).
    """

    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    p: np.ndarray | None
    q: np.ndarray | None
    found: np.ndarray
    floor: np.ndarray
    n: int
    clusters: int
    trials: int
    seed: int
    note: str = ""


def effects(values, clusters: Sequence[Hashable], *, seed: int, floor=0.0) -> Effects:
    """Mean over examples of each column of ``values`` [n, ...], its 95 % interval, p, q, and whether it is a finding.

    ``clusters``: a label for each example. ``floor``: a number, or an array that broadcasts to [...]. As many resamples
    as a lone finding among all columns needs. Raises ``StoneyError`` for no examples, values that are not finite (leave
    out what can't be scored), and labels or a floor that don't fit.
    """
    flat, shape, unit = _checked(values, clusters)
    floor = _fitting(floor, shape)
    mean, units = flat.mean(axis=0), int(unit.max()) + 1
    trials = max(TRIALS, int(np.ceil(2 * len(mean) / LEVEL)))
    common = {"floor": floor, "n": len(flat), "clusters": units, "seed": seed}
    if units < MIN_UNITS:
        note = f"{units} clusters: too few to find anything, {MIN_UNITS} are needed"
        found = np.zeros(shape, dtype=bool)
        return Effects(mean.reshape(shape), None, None, None, None, found, trials=0, note=note, **common)
    sums, sizes = np.zeros((units, len(mean))), np.bincount(unit).astype(np.float64)
    np.add.at(sums, unit, flat)
    low, high, p = _bootstrap_t(sums, sizes, trials, seed)
    p = np.maximum(p, sign_flip_p(sums, trials=trials, seed=seed))
    q = _false_discovery(p)
    low, high, p, q, mean = (array.reshape(shape) for array in (low, high, p, q, mean))
    return Effects(mean, low, high, p, q, (q <= LEVEL) & (np.abs(mean) > floor), trials=trials, **common)


def difference(values_a, values_b, clusters: Sequence[Hashable], *, seed: int, floor=0.0) -> Effects:
    """The same for b minus a, two models on the same examples in one order, both [n, ...]. Raises as ``effects``."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (values_a, values_b))
    if a.shape != b.shape:
        raise StoneyError(
            f"values of two models: shapes {a.shape} and {b.shape}; expected the same examples and columns"
        )
    return effects(b - a, clusters, seed=seed, floor=floor)


def random_floor(values: Sequence) -> float:
    """The largest |mean| of any column in any of the models with random weights; of each model the values [n, ...].

    In a unit that means the same in both: the raw logits of random weights are small, and so would the floor be.
    Raises ``StoneyError`` without a model.
    """
    if not len(values):
        raise StoneyError("a floor needs the values of at least one model with random weights")
    return max(float(np.abs(np.asarray(one, dtype=np.float64).mean(axis=0)).max()) for one in values)


def halves(clusters: Sequence[Hashable], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one half of the clusters, drawn at random, and rows of the other half, both ascending.

    With an odd number of clusters the second has one more. Raises ``StoneyError`` for fewer than two clusters.
    """
    unit = _units(clusters)
    count = int(unit.max()) + 1 if len(unit) else 0
    if count < 2:
        raise StoneyError(f"halves: {count} cluster, expected at least two: one to choose on and one to report on")
    first = np.isin(unit, np.random.default_rng(seed).permutation(count)[: count // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


def sign_flip_p(sums: np.ndarray, *, trials: int, seed: int) -> np.ndarray:
    """Two-sided p [k] that the cluster sums [cluster, k] are as likely negative as positive: share of flips of whole
    clusters whose |total| is at least the one seen. All 2^cluster patterns if half of them are no more than ``trials``
    (the other half are their mirror images); otherwise (c + 1) / (trials + 1) of random ones."""
    units, columns = sums.shape
    seen = np.abs(sums.sum(axis=0)) - 1e-9 * np.abs(sums).sum(axis=0)  # equal totals may differ by rounding
    patterns = 2 ** (units - 1)
    exact = patterns <= trials
    rng, as_large = np.random.default_rng(seed), np.zeros(columns, dtype=np.int64)
    block = max(1, _CELLS // max(units, columns))
    for start in range(0, patterns if exact else trials, block):
        rows = np.arange(start, min(start + block, patterns if exact else trials))
        flipped = (rows[:, None] >> np.arange(units)) & 1 if exact else rng.integers(2, size=(len(rows), units))
        as_large += (np.abs((1.0 - 2.0 * flipped) @ sums) >= seen).sum(axis=0)
    return as_large / patterns if exact else (as_large + 1) / (trials + 1)


def _bootstrap_t(sums: np.ndarray, sizes: np.ndarray, trials: int, seed: int) -> tuple[np.ndarray, ...]:
    """Interval bounds of sum/size and two-sided p against zero, each [k], from cluster sums [cluster, k].

    t* = (m* - m) / s*, with m = sum S / sum n, s^2 = sum (S - m n)^2 / (sum n)^2 over clusters; the interval is
    m - s t*[97.5 %] to m - s t*[2.5 %], and p is the level at which it would just reach zero.
    """
    columns = sums.shape[1]
    mean = sums.sum(axis=0) / sizes.sum()
    error = sums - mean * sizes[:, None]
    scale = np.sqrt((error**2).sum(axis=0)) / sizes.sum()
    constant = scale <= 1e-12 * np.abs(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.where(mean == 0, 0.0, mean / scale)
    cut = max(1, int((trials + 1) * (1 - CONFIDENCE) / 2))
    low, high, p = np.empty(columns), np.empty(columns), np.empty(columns)
    width = max(1, _CELLS // (4 * trials))
    for start in range(0, columns, width):  # the same resamples for each block of columns: the same seed
        part = slice(start, start + width)
        t = np.sort(_resampled_t(error[:, part], sizes, trials, seed), axis=0)
        low[part], high[part] = mean[part] - t[-cut] * scale[part], mean[part] - t[cut - 1] * scale[part]
        beyond = np.minimum((t >= seen[part]).sum(axis=0), (t <= seen[part]).sum(axis=0))
        p[part] = np.minimum(1.0, 2 * (beyond + 1) / (trials + 1))
    low[constant], high[constant] = np.nan, np.nan
    return low, high, p


def _resampled_t(error: np.ndarray, sizes: np.ndarray, trials: int, seed: int) -> np.ndarray:
    """t* [trial, k]. All of it is made of sums over the drawn clusters of e, e^2, e n, n, n^2 (e: error, n: size)."""
    units, n = len(error), sizes[:, None]
    statistics = np.hstack([error, error**2, error * n, n, n**2])
    return resample(statistics, _studentised, seed=seed, resamples=trials, size=math.ceil(SHARE * units))


def _studentised(totals: np.ndarray) -> np.ndarray:
    """t* [trial, k] from the totals [trial, 3 k + 2]."""
    e, e2, en = np.split(totals[:, :-2], 3, axis=1)
    shift = e / totals[:, -2:-1]
    square = e2 - 2 * shift * en + shift**2 * totals[:, -1:]
    spread = np.where(square > 1e-12 * e2, square, 0.0)  # one cluster, drawn over and over: no spread, but rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(e == 0, 0.0, e / np.sqrt(spread))


def _false_discovery(p: np.ndarray) -> np.ndarray:
    from scipy.stats import false_discovery_control

    return false_discovery_control(p)


def _checked(values, clusters) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Values as float64 [n, k], the shape of one example's, and the number of each example's cluster [n]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 1 or not array.size:
        raise StoneyError(f"values: shape {array.shape}, expected one value or more for each of at least one example")
    if len(clusters) != len(array):
        raise StoneyError(f"clusters: {len(clusters)} labels for {len(array)} examples: expected one for each example")
    if not np.isfinite(array).all():
        rows = len(np.unique(np.argwhere(~np.isfinite(array))[:, 0]))
        raise StoneyError(
            f"values: {rows} of {len(array)} examples are not finite: leave out, and count, what has no score"
        )
    return array.reshape(len(array), -1), array.shape[1:], _units(clusters)


def _units(clusters: Sequence[Hashable]) -> np.ndarray:
    labels = clusters.tolist() if hasattr(clusters, "tolist") else clusters
    number = {label: position for position, label in enumerate(dict.fromkeys(labels))}
    return np.array([number[label] for label in labels], dtype=np.int64)


def _fitting(floor, shape: tuple[int, ...]) -> np.ndarray:
    floor = np.asarray(floor, dtype=np.float64)
    try:
        return np.broadcast_to(floor, shape)
    except ValueError as error:
        raise StoneyError(f"floor: shape {floor.shape} does not fit values of shape {shape} an example") from error
