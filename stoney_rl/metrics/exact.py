"""Exact match: the strictest question, whether the answer is the reference.

Compared after ``text.normalize`` and nothing else: case, quotes, punctuation and diacritics count. A right form in
another sentence is what form accuracy is for (``forms``), so there is no lenient variant to choose between.
"""

from collections.abc import Sequence

from stoney_rl.metrics.checks import NORM_SIGNATURE, check_pairs
from stoney_rl.text import normalize

SIGNATURE = f"exact|case:mixed|punctuation:kept|{NORM_SIGNATURE}"


def exact_match(*, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """For each row 1.0 if the normalised prediction is the normalised reference, else 0.0. Errors as ``chrf.chrf``."""
    check_pairs(predictions, references)
    return [float(normalize(p) == normalize(r)) for p, r in zip(predictions, references, strict=True)]
