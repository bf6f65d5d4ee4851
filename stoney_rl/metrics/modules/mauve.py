from stoney_rl.metrics import mauve
from stoney_rl.metrics.modules import base


class Mauve(base.Module):
    """MAUVE with the features of a model folder (``metrics.mauve``)."""

    def _compute(self, predictions: list[str], references: list[str], featurizer: str) -> dict:
        features = mauve.load_featurizer(featurizer)
        return mauve.mauve(predictions=predictions, references=references, featurizer=features).as_dict("mauve")
