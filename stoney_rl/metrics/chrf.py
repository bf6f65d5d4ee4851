"""chrF++ (Popović 2017, https://aclanthology.org/W17-4770) as sacreBLEU computes it: CHRF(word_order=2), beta 2, 0-100.

The corpus score is a function of n-gram counts summed over the rows, so a bootstrap resample is a sum of count rows
and never recounts an n-gram. ``score_from_counts`` gives sacreBLEU's own score to the last digit.
"""

from collections.abc import Sequence

from stoney_rl.metrics.checks import NORM_SIGNATURE, check_pairs
from stoney_rl.text import normalize

CHAR_ORDER = 6
WORD_ORDER = 2
BETA = 2
# For each n-gram order: how many in the hypothesis, in the reference, in both.
COUNTS = 3 * (CHAR_ORDER + WORD_ORDER)


def chrf(*, predictions: Sequence[str], references: Sequence[str]) -> dict:
    """Corpus chrF++ of ``predictions`` (one a row) against ``references`` (one a row), normalised first.

    Returns ``score`` (0-100), ``signature`` (sacreBLEU's plus the normaliser), ``n`` (rows) and ``suspicious``: true
    when every prediction equals its reference, which more often means that one list was passed twice than that a
    model is perfect. Raises StoneyError for lists that are nested, empty, of different lengths, not of strings, or
    that hold an empty reference. Keyword-only: recall weighs more than precision, so swapped lists give another score.
    """
    counts = statistics(predictions=predictions, references=references)
    same = all(normalize(p) == normalize(r) for p, r in zip(predictions, references, strict=True))
    return {
        "score": float(score_from_counts(counts.sum(axis=0))),
        "signature": signature(),
        "n": len(predictions),
        "suspicious": same,
    }


def statistics(*, predictions: Sequence[str], references: Sequence[str]):
    """Each row's n-gram counts: int64 array [row, 24] = [row, order x (hypothesis, reference, match)].

    Orders: characters 1-6, then words 1-2. Raises StoneyError as ``chrf`` does.
    """
    import numpy as np

    check_pairs(predictions, references)
    # The public corpus_score sums these same counts; tests/test_metrics.py holds the two equal.
    counts = _metric()._extract_corpus_statistics(
        [normalize(text) for text in predictions], [[normalize(text) for text in references]]
    )
    return np.asarray(counts, dtype=np.int64).reshape(len(predictions), COUNTS)


def score_from_counts(counts):
    """chrF++ (0-100) of summed counts: [..., 24] -> [...]. Summed over rows: corpus score; of one row: sentence score.

    The arithmetic and its order are sacreBLEU's CHRF._compute_f_score with effective order (eps_smoothing=False):
    orders that the hypothesis or the reference is too short for are left out of the average.
    """
    import numpy as np

    counts = np.asarray(counts, dtype=np.float64)
    precision = np.zeros(counts.shape[:-1])
    recall = np.zeros(counts.shape[:-1])
    orders = np.zeros(counts.shape[:-1])
    for order in range(CHAR_ORDER + WORD_ORDER):
        hypothesis, reference, match = (counts[..., 3 * order + part] for part in range(3))
        counted = (hypothesis > 0) & (reference > 0)
        precision = precision + np.divide(match, hypothesis, out=np.zeros_like(match), where=counted)
        recall = recall + np.divide(match, reference, out=np.zeros_like(match), where=counted)
        orders = orders + counted
    orders = np.maximum(orders, 1)
    precision, recall = precision / orders, recall / orders
    f_score = (1 + BETA**2) * precision * recall
    denominator = BETA**2 * precision + recall
    return 100 * np.divide(f_score, denominator, out=np.zeros_like(f_score), where=denominator > 0)


def signature() -> str:
    """sacreBLEU's signature for one reference a row, with the normaliser added at the end."""
    metric = _metric()
    metric.num_refs = 1
    return f"chrF{BETA}{'+' * WORD_ORDER}|{metric.get_signature()}|{NORM_SIGNATURE}"


def _metric():
    from sacrebleu.metrics import CHRF

    return CHRF(char_order=CHAR_ORDER, word_order=WORD_ORDER, beta=BETA)
