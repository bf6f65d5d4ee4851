"""What the modules beside this file share: the columns that they take, and the checks of those columns."""

from collections.abc import Sequence

import datasets
import evaluate

from stoney_rl.metrics.checks import check_column, check_pairs
from stoney_rl.metrics.forms import check_targets

_TEXT = datasets.Value("string")
_COLUMNS = {"predictions": _TEXT, "references": _TEXT, "questions": _TEXT, "targets": datasets.List(_TEXT)}


class Module(evaluate.Metric):
    """An ``evaluate.Metric`` whose ``compute`` returns ``Score.as_dict``; a subclass names its ``columns``.

    ``compute`` raises StoneyError for columns that are nested, empty, of different lengths or not of strings, and for a
    blank reference.
    """

    columns: tuple[str, ...] = ("predictions", "references")

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: _COLUMNS[name] for name in self.columns})
        inputs = ", ".join(self.columns)
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description=inputs, features=features
        )

    def add_batch(
        self, *, predictions: Sequence[str], references: Sequence[str] | None = None, **others: Sequence
    ) -> None:
        """Checked here and not in ``_compute``: by then evaluate has turned the number 3 into the text "3"."""
        check_column("predictions", predictions)
        columns = {"predictions": predictions, "references": references, **others}
        columns = {name: columns[name] for name in self.columns}
        for name, column in columns.items():
            if name == "references":
                check_pairs(predictions, column)
            elif name == "targets":
                check_targets(predictions, column)
            else:
                check_column(name, column, len(predictions))
        super().add_batch(**columns)
