"""What every metric returns: one value for the set, one for each row, and what could not be scored."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """``value``: of the whole set, None where nothing could be scored or where the number would mislead (``note``).

    rows: each row's own value, None where unscored; empty for a metric of the set as a whole. n, unscored: rows with
    and without a value. note: what to know before reading the value, such as why there is none. spread: (least, greatest)
    value over the metric's own random seeds. scale: (worst, best) value; COMET's are nominal, a model may go beyond them.
    """

    value: float | None
    rows: tuple[float | None, ...]
    n: int
    unscored: int
    signature: str
    note: str = ""
    spread: tuple[float, float] | None = None
    scale: tuple[float, float] = (0.0, 1.0)

    def as_dict(self, name: str) -> dict:
        """The result of an ``evaluate.Metric`` called ``name``; spread and note only where there are any."""
        found = {name: self.value, "n": self.n, "unscored": self.unscored, "signature": self.signature}
        found |= {"rows": list(self.rows)} if self.rows else {}
        found |= {"spread": list(self.spread)} if self.spread else {}
        return found | ({"note": self.note} if self.note else {})


def row_mean(
    values: Sequence[float | None], signature: str, *, note: str = "", scale: tuple[float, float] = (0.0, 1.0)
) -> Score:
    """The score whose value is the mean over the rows that have one."""
    scored = [value for value in values if value is not None]
    value = sum(scored) / len(scored) if scored else None
    return Score(value, tuple(values), len(scored), len(values) - len(scored), signature, note, scale=scale)
