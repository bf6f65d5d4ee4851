from stoney_rl.metrics.modules import base
from stoney_rl.metrics.suite import STRING_METRICS, Gold


class FormAccuracy(base.Module):
    """The share of the asked forms that the answers hold (``metrics.forms``)."""

    columns = ("predictions", "targets")

    def _compute(self, predictions: list[str], targets: list[list[str] | None]) -> dict:
        gold = Gold(targets=targets)
        return STRING_METRICS["form"](predictions, gold).as_dict("form")
