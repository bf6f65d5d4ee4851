from stoney_rl.metrics import suite
from stoney_rl.metrics.modules import base


class Comet(base.Module):
    """COMET by a ``scorer`` (``metrics.comet.CometScorer``): see ``metrics.suite.comet_metric``."""

    columns = ("predictions", "references", "questions")

    def _compute(
        self, predictions: list[str], references: list[str], questions: list[str], scorer: suite.Scorer
    ) -> dict:
        gold = suite.Gold(references=references, questions=questions)
        return suite.comet_metric(scorer)(predictions, gold).as_dict("comet")
