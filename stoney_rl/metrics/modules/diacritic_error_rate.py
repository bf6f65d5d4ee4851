from stoney_rl.metrics.modules import base
from stoney_rl.metrics.suite import STRING_METRICS, Gold


class DiacriticErrorRate(base.Module):
    """The share of marked letters with wrong marks (``metrics.error_rates``)."""

    columns = ("predictions", "targets")

    def _compute(self, predictions: list[str], targets: list[list[str] | None]) -> dict:
        gold = Gold(targets=targets)
        return STRING_METRICS["diacritic_error_rate"](predictions, gold).as_dict("diacritic_error_rate")
