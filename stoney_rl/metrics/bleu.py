"""BLEU (Papineni et al. 2002, https://aclanthology.org/P02-1040) as sacreBLEU computes it by default, 0-100.

BLEU counts whole words of one to four in a row. In a language that builds words from many pieces nearly every miss is a
miss of the whole word, so read chrF++ first (Popović 2017); BLEU is here because readers ask for it.
"""

from collections.abc import Sequence

from stoney_rl.metrics.checks import NORM_SIGNATURE, check_pairs
from stoney_rl.text import normalize

ORDER = 4
# Length of the hypothesis and of the reference, then for each n-gram order the matches, then the hypothesis n-grams.
COUNTS = 2 + 2 * ORDER


def statistics(*, predictions: Sequence[str], references: Sequence[str]):
    """Each row's counts, int64 array [row, 10]; summed over rows they give the corpus score.

    Raises StoneyError as ``chrf.chrf`` does.
    """
    import numpy as np

    check_pairs(predictions, references)
    counts = _metric()._extract_corpus_statistics(
        [normalize(text) for text in predictions], [[normalize(text) for text in references]]
    )
    return np.asarray(counts, dtype=np.int64).reshape(len(predictions), COUNTS)


def score_from_counts(counts, *, sentence: bool = False):
    """BLEU (0-100) of summed counts, [..., 10] -> [...]: sacreBLEU's own arithmetic on each line of counts.

    ``sentence``: leave out the orders that a text is too short for (sacreBLEU's effective order), as is usual for one row.
    """
    import numpy as np

    return np.apply_along_axis(lambda line: _score(line.tolist(), sentence), -1, np.asarray(counts))


def _score(counts: list, sentence: bool) -> float:
    from sacrebleu.metrics import BLEU

    return BLEU.compute_bleu(
        correct=counts[2 : 2 + ORDER],
        total=counts[2 + ORDER :],
        sys_len=int(counts[0]),
        ref_len=int(counts[1]),
        smooth_method="exp",
        effective_order=sentence,
        max_ngram_order=ORDER,
    ).score


def signature() -> str:
    """sacreBLEU's signature of the corpus score for one reference a row, with the normaliser added at the end."""
    metric = _metric()
    metric.num_refs = 1
    return f"BLEU|{metric.get_signature()}|{NORM_SIGNATURE}"


def _metric():
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=ORDER)
