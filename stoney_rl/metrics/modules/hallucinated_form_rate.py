from stoney_rl.metrics.modules import base
from stoney_rl.metrics.suite import STRING_METRICS, Gold
from stoney_rl.rewards.knowledge import load_knowledge


class HallucinatedFormRate(base.Module):
    """The share of words that nothing attests (``metrics.error_rates``); ``lexicon``: a path."""

    columns = ("predictions", "references", "questions")

    def _compute(self, predictions: list[str], references: list[str], questions: list[str], lexicon: str) -> dict:
        gold = Gold(references=references, questions=questions, knowledge=load_knowledge(lexicon))
        return STRING_METRICS["hallucinated_form_rate"](predictions, gold).as_dict("hallucinated_form_rate")
