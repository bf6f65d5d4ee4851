from stoney_rl.metrics.modules import base
from stoney_rl.metrics.suite import STRING_METRICS, Gold


class ExactMatch(base.Module):
    """The share of answers that are the reference (``metrics.exact``)."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        gold = Gold(references=references)
        return STRING_METRICS["exact"](predictions, gold).as_dict("exact")
