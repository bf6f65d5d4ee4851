"""Everything that is said about answers, from the answers alone: what an evaluation writes and what --verify makes again.

    numbers, found = measure({"grpo": rows, "base": rows}, entries, optional, seed=0, resamples=2000, validate=False)

COMET and MAUVE need models that may be missing, gated or too large. Where one fails, its line goes to
``numbers["unavailable"]`` and the other metrics come out all the same.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from stoney_rl.errors import StoneyError
from stoney_rl.lexicon import LexiconEntry
from stoney_rl.metrics import comet, comparison, errors, mauve, pass_at_k, suite, validation
from stoney_rl.metrics.report import HEADLINE
from stoney_rl.metrics.score import Score
from stoney_rl.models import find_model
from stoney_rl.rewards.knowledge import Knowledge

Opened = Callable[[], AbstractContextManager[suite.Metric]]  # the metric, while its model is loaded
MODELS = {"comet": "comet_model", "mauve": "mauve_featurizer"}  # metric -> the argument that names its model
CLOSE = 1e-6  # of two numbers that count as equal: models on another machine round otherwise


def optional_metrics(
    *, comet_model: str | None = None, comet_timeout: float = 600.0, mauve_featurizer: str | None = None
) -> dict[str, Opened]:
    """COMET and MAUVE, as far as asked for, to be opened once the answers are there; nothing is loaded yet.

    Raises ``StoneyError`` for a COMET checkpoint or a source of features that is not there or not of the right kind.
    """
    optional: dict[str, Opened] = {}
    if comet_model:
        comet.find_checkpoint(comet_model)
        optional["comet"] = lambda: _open_comet(comet_model, comet_timeout)
    if mauve_featurizer:
        if find_model(mauve_featurizer).kind == "adapter":
            raise StoneyError(f"{mauve_featurizer}: an adapter; MAUVE's features need a whole model, such as its base")
        optional["mauve"] = lambda: contextlib.nullcontext(suite.mauve_metric(mauve.load_featurizer(mauve_featurizer)))
    return optional


@contextlib.contextmanager
def _open_comet(model: str, timeout: float) -> Iterator[suite.Metric]:
    with comet.CometScorer(model, python=comet.PYTHON, timeout=timeout) as scorer:
        yield suite.comet_metric(scorer)


def measure(
    answers: Mapping[str, Sequence[dict]],
    entries: Sequence[LexiconEntry],
    optional: Mapping[str, Opened],
    *,
    seed: int,
    resamples: int,
    validate: bool,
) -> tuple[dict, dict[str, list[dict]]]:
    """The numbers, and the error of each answer (``errors.classify``) by system.

    ``answers``: the prediction rows of each system, all of the same rows in one order, the model that is evaluated first.
    The numbers, ready for JSON: {"systems": {name: ``comparison.score``}, "comparison": ``comparison.compare`` by the metrics
    of ``report.HEADLINE``, the model last, or None of a single system, "errors": {name: ``errors.counts``}, {} without
    ``entries``, "validity": ``validation.validate`` or None, "unavailable": {metric: why}}. Raises ``StoneyError`` for rows that don't fit together.
    """
    attested = errors.Attested.of(entries) if entries else None
    knowledge = attested.knowledge if attested else None
    first, *others = answers
    scores, validity, unavailable = _scores(answers, knowledge, optional, seed, validate)
    tables = {name: comparison.table(name, answers[name], scores[name]) for name in [*others, first]}
    tested = [
        dataclasses.replace(one, columns={metric: one.columns[metric] for metric in HEADLINE})
        for one in tables.values()
    ]
    found = {}
    if attested:
        metadata = {row["id"]: row["metadata"] for row in answers[first]}
        found = {name: errors.classify(rows, attested, metadata=metadata) for name, rows in answers.items()}
    numbers = {
        "systems": {name: comparison.score(tables[name], seed=seed, resamples=resamples) for name in answers},
        "comparison": comparison.compare(tested, seed=seed, resamples=resamples) if others else None,
        "errors": {name: errors.counts(classified) for name, classified in found.items()},
        "validity": validity,
        "unavailable": unavailable,
    }
    return numbers, found


def _scores(
    answers: Mapping[str, Sequence[dict]],
    knowledge: Knowledge | None,
    optional: Mapping[str, Opened],
    seed: int,
    validate: bool,
) -> tuple[dict[str, dict[str, Score]], dict | None, dict[str, str]]:
    """The scores of each system by every metric; what the corruption of gold shows of each metric; what is unavailable."""
    rows = next(iter(answers.values()))
    scores: dict[str, dict[str, Score]] = {name: {} for name in answers}
    validity, unavailable = None, {}
    for name, opened in {"": lambda: contextlib.nullcontext(None), **optional}.items():
        try:
            with opened() as metric:
                metrics = {name: metric} if name else suite.STRING_METRICS
                new = {system: suite.score_rows(metrics, answers[system], knowledge) for system in answers}
                screened = validation.validate(metrics, rows, knowledge, seed=seed) if validate else None
        except StoneyError as error:
            if not name:
                raise
            print(f"{error}\n  {name} is left out; the other metrics are not touched by that.")
            unavailable[name] = str(error)
            continue
        for system in answers:
            scores[system] |= new[system]
        if screened:
            validity = screened | {"metrics": (validity or screened)["metrics"] | screened["metrics"]}
    for system in answers:
        scores[system] |= pass_at_k.scores(answers[system])
    return scores, validity, unavailable


def lexicon_sha256(entries: Sequence[LexiconEntry]) -> str:
    """SHA-256 of what the entries say."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(one) for one in entries]).encode()).hexdigest()


def differences(recorded: object, fresh: object, where: str = "") -> list[str]:
    """A line for each value that is not the same in two sets of numbers: where it is, what was recorded, what is found now.

    Numbers within ``CLOSE`` of each other are the same; what was measured in seconds is passed over.
    """
    fresh = json.loads(json.dumps(fresh)) if not where else fresh
    if isinstance(recorded, dict) and isinstance(fresh, dict):
        keys = [key for key in {**recorded, **fresh} if key != "seconds_per_1000"]
        return [
            line
            for key in keys
            for line in differences(recorded.get(key), fresh.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(recorded, list) and isinstance(fresh, list) and len(recorded) == len(fresh):
        pairs = enumerate(zip(recorded, fresh, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{where}[{index}]")]
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (recorded, fresh))
    if recorded == fresh or (numbers and math.isclose(recorded, fresh, rel_tol=CLOSE, abs_tol=CLOSE)):
        return []
    return [f"{where}: recorded {_short(recorded)}, now {_short(fresh)}"]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
