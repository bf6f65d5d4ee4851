"""Every metric under one signature: ``metric(predictions, gold) -> Score``. The one list that all callers share.

gold = Gold.of(rows, knowledge)
STRING_METRICS["chrf"](predictions, gold).value
score_rows({**STRING_METRICS, "comet": comet_metric(scorer)}, rows, knowledge)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from stoney_rl.errors import StoneyError
from stoney_rl.metrics import bleu, chrf, error_rates, exact, forms, mauve
from stoney_rl.metrics.checks import check_column, check_pairs
from stoney_rl.metrics.mauve import Featurizer
from stoney_rl.metrics.retrieval import question_of
from stoney_rl.metrics.score import Score, row_mean
from stoney_rl.rewards.knowledge import Knowledge
from stoney_rl.text import normalize


@dataclass(frozen=True)
class Gold:
    """What the answers are compared with, one of each for a row; None for what a metric does not need.

    targets: the forms that a row asks for, None or an empty list where it asks for none. questions: what was asked.
    """

    references: Sequence[str] | None = None
    targets: Sequence[Sequence[str] | None] | None = None
    questions: Sequence[str] | None = None
    knowledge: Knowledge | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping], knowledge: Knowledge | None = None) -> "Gold":
        """The gold side of prediction rows (``predictions.record``)."""
        return cls(
            references=[row["reference"] for row in rows],
            targets=[row.get("forms") for row in rows],
            questions=[question_of(row["prompt"]) for row in rows],
            knowledge=knowledge,
        )


Metric = Callable[[Sequence[str], Gold], Score]
ERROR_RATE = (1.0, 0.0)  # (worst, best)


class Scorer(Protocol):
    """A COMET model, such as ``comet.CometScorer``: one number a row. ``signature`` may be None until it has scored."""

    signature: str | None

    def score(self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]) -> list[float]: ...


def _chrf(predictions: Sequence[str], gold: Gold) -> Score:
    counts = chrf.statistics(predictions=predictions, references=gold.references)
    return Score(
        value=float(chrf.score_from_counts(counts.sum(axis=0))),
        rows=tuple(chrf.score_from_counts(counts).tolist()),
        n=len(predictions),
        unscored=0,
        signature=chrf.signature(),
        scale=(0.0, 100.0),
    )


def _bleu(predictions: Sequence[str], gold: Gold) -> Score:
    counts = bleu.statistics(predictions=predictions, references=gold.references)
    return Score(
        value=float(bleu.score_from_counts(counts.sum(axis=0))),
        rows=tuple(bleu.score_from_counts(counts, sentence=True).tolist()),
        n=len(predictions),
        unscored=0,
        signature=bleu.signature(),
        scale=(0.0, 100.0),
    )


def _exact(predictions: Sequence[str], gold: Gold) -> Score:
    return row_mean(exact.exact_match(predictions=predictions, references=gold.references), exact.SIGNATURE)


def _form(predictions: Sequence[str], gold: Gold) -> Score:
    return row_mean(forms.form_accuracy(predictions=predictions, targets=gold.targets), forms.SIGNATURE)


def _diacritics(predictions: Sequence[str], gold: Gold) -> Score:
    values = error_rates.diacritic_error_rate(predictions=predictions, targets=gold.targets)
    return row_mean(values, error_rates.DIACRITIC_SIGNATURE, scale=ERROR_RATE)


def _morphology(predictions: Sequence[str], gold: Gold) -> Score:
    signature = error_rates.MORPHOLOGY_SIGNATURE
    if gold.knowledge is None:
        return _without_lexicon(predictions, signature)
    values = error_rates.morphology_error_rate(predictions=predictions, targets=gold.targets, knowledge=gold.knowledge)
    return row_mean(values, signature, scale=ERROR_RATE)


def _hallucination(predictions: Sequence[str], gold: Gold) -> Score:
    signature = error_rates.HALLUCINATION_SIGNATURE
    if gold.knowledge is None:
        return _without_lexicon(predictions, signature)
    values = error_rates.hallucinated_form_rate(
        predictions=predictions, references=gold.references, questions=gold.questions, knowledge=gold.knowledge
    )
    return row_mean(values, signature, scale=ERROR_RATE)


def _without_lexicon(predictions: Sequence[str], signature: str) -> Score:
    return row_mean([None] * len(predictions), signature, note="no lexicon was given", scale=ERROR_RATE)


STRING_METRICS: dict[str, Metric] = {
    "chrf": _chrf,
    "bleu": _bleu,
    "exact": _exact,
    "form": _form,
    "diacritic_error_rate": _diacritics,
    "morphology_error_rate": _morphology,
    "hallucinated_form_rate": _hallucination,
}


def comet_metric(scorer: Scorer) -> Metric:
    """COMET (Rei et al. 2020, https://aclanthology.org/2020.emnlp-main.213) by ``scorer``: the mean of its row scores.

    The source is the question, the hypothesis the answer, the reference the gold answer. No published COMET model was
    trained on Stoney Nakoda: run ``validation.validate`` before you believe a number of it.
    """

    def metric(predictions: Sequence[str], gold: Gold) -> Score:
        check_pairs(predictions, gold.references)
        check_column("questions", gold.questions, len(predictions))
        values = scorer.score(list(gold.questions), list(predictions), list(gold.references))
        if len(values) != len(predictions):
            raise StoneyError(f"COMET: {len(values)} scores for {len(predictions)} rows: expected one each")
        return row_mean(values, f"{scorer.signature}|avg:row")

    return metric


def mauve_metric(featurizer: Featurizer) -> Metric:
    """MAUVE of the answers as a set against the references as a set (``metrics.mauve``); one null check for all systems."""
    known: dict[tuple[str, ...], list[float]] = {}

    def metric(predictions: Sequence[str], gold: Gold) -> Score:
        check_pairs(predictions, gold.references)
        references = tuple(map(normalize, gold.references))
        if references not in known:
            known[references] = mauve.null_values(featurizer.encode(references))
        null = known[references]
        return mauve.mauve(predictions=predictions, references=references, featurizer=featurizer, null=null)

    return metric


def score_rows(
    metrics: Mapping[str, Metric], rows: Sequence[Mapping], knowledge: Knowledge | None = None
) -> dict[str, Score]:
    """Every metric of the predictions in ``rows`` (``predictions.record``), by name.

    Rows without a prediction or with a blank reference are unscored by all of them; ``Score.rows`` is in the order of
    ``rows``. Where no row is left, every value is None.
    """
    usable = [i for i, row in enumerate(rows) if row["prediction"] is not None and normalize(row["reference"])]
    if not usable:
        return {name: Score(None, (None,) * len(rows), 0, len(rows), "", "no row can be scored") for name in metrics}
    kept = [rows[i] for i in usable]
    gold = Gold.of(kept, knowledge)
    scores = {name: metric([row["prediction"] for row in kept], gold) for name, metric in metrics.items()}
    return {name: _over_all_rows(score, usable, len(rows)) for name, score in scores.items()}


def _over_all_rows(score: Score, usable: Sequence[int], size: int) -> Score:
    values: list[float | None] = [None] * size
    for position, value in zip(usable, score.rows, strict=False):
        values[position] = value
    unscored = score.unscored + size - len(usable)
    return replace(score, rows=tuple(values) if score.rows else (), unscored=unscored)
