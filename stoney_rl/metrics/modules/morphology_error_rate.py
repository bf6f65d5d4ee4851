from stoney_rl.metrics.modules import base
from stoney_rl.metrics.suite import STRING_METRICS, Gold
from stoney_rl.rewards.knowledge import load_knowledge


class MorphologyErrorRate(base.Module):
    """The share of needed affixes that are wrong or missing (``metrics.error_rates``); ``lexicon``: a path."""

    columns = ("predictions", "targets")

    def _compute(self, predictions: list[str], targets: list[list[str] | None], lexicon: str) -> dict:
        gold = Gold(targets=targets, knowledge=load_knowledge(lexicon))
        return STRING_METRICS["morphology_error_rate"](predictions, gold).as_dict("morphology_error_rate")
