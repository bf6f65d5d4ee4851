"""pass@k: would at least one of k sampled answers have all the forms that were asked for?

Of a row's n samples c are right. 1 - C(n - c, k) / C(n, k) is then the unbiased estimate of the chance that k samples hold
a right one (Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1); 1 - (1 - c/n)^k would be too low.
It shows what the model can say, not what it says first: k answers are compared with gold, which no user has.
"""

from collections.abc import Sequence
from math import comb

from stoney_rl.errors import StoneyError
from stoney_rl.metrics import forms
from stoney_rl.metrics.checks import NORM_SIGNATURE
from stoney_rl.metrics.score import Score, row_mean


def pass_at_k(n: int, right: int, k: int) -> float:
    """The estimate from ``n`` samples of which ``right`` are right. Raises StoneyError unless right <= n and 1 <= k <= n."""
    if not (0 <= right <= n and 1 <= k <= n):
        raise StoneyError(
            f"pass@{k}: expected 1 to {n} of the {n} samples, at most {n} of them right, got {right} right"
        )
    return 1 - comb(n - right, k) / comb(n, k)


def scores(rows: Sequence[dict]) -> dict[str, Score]:
    """pass@1, pass@2, pass@4 ... and pass@n of prediction rows with ``samples``, n texts each; {} where no row has any.

    A row without samples or asked forms is unscored. Raises StoneyError if rows have different numbers of samples.
    """
    sampled = [row["samples"] for row in rows if row.get("samples")]
    if not sampled:
        return {}
    settings = {(len(samples["texts"]), samples["temperature"]) for samples in sampled}
    if len(settings) > 1:
        raise StoneyError(
            f"pass@k: rows have different samples (number, temperature): {sorted(settings)}; sample them alike"
        )
    [(n, temperature)] = settings
    right = [_right(row) for row in rows]
    found = {}
    for k in sorted({n, *(2**power for power in range(n.bit_length()))}):
        signature = f"pass@{k}|samples:{n}|temperature:{temperature:g}|right:all-forms|{NORM_SIGNATURE}"
        found[f"pass@{k}"] = row_mean([None if c is None else pass_at_k(n, c, k) for c in right], signature)
    return found


def _right(row: dict) -> int | None:
    """How many samples have every form that the row asks for; None where there are no samples or it asks for none."""
    if not row.get("samples") or not row.get("forms"):
        return None
    texts = row["samples"]["texts"]
    return sum(share == 1 for share in forms.form_accuracy(predictions=texts, targets=[row["forms"]] * len(texts)))
