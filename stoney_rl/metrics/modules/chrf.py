from stoney_rl.metrics.modules import base
from stoney_rl.metrics.suite import STRING_METRICS, Gold


class ChrF(base.Module):
    """chrF++ of the answers, 0-100 (``metrics.chrf``)."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        gold = Gold(references=references)
        return STRING_METRICS["chrf"](predictions, gold).as_dict("chrf")
