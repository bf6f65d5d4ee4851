from stoney_rl.metrics.modules import base
from stoney_rl.metrics.suite import STRING_METRICS, Gold


class Bleu(base.Module):
    """BLEU of the answers, 0-100 (``metrics.bleu``)."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        gold = Gold(references=references)
        return STRING_METRICS["bleu"](predictions, gold).as_dict("bleu")
