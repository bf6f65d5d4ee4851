"""Form accuracy: did the answer contain the word forms that the row asks for?

A share of 1.0 means every asked form stands in the prediction as a whole word (``lexemes.contains_form``). It says
nothing about the rest of the answer: a prediction that lists every word it knows scores well here and badly on chrF++,
so the two are reported together.
"""

from collections.abc import Sequence

from stoney_rl.errors import StoneyError
from stoney_rl.metrics.checks import NORM_SIGNATURE, check_texts
from stoney_rl.text import fold, words

SIGNATURE = f"form|match:whole-word|share:per-row|{NORM_SIGNATURE}"


def form_accuracy(*, predictions: Sequence[str], targets: Sequence[Sequence[str] | None]) -> list[float | None]:
    """For each row the share of its asked forms (``targets[row]``) that occur in the prediction, in [0, 1].

    None where no form is asked (None or an empty list): such a row is unscored, not right or wrong. A form asked
    twice counts once. Raises StoneyError for lists of different lengths, a target that is a string instead of a list
    of strings, or an asked form without a letter: no text contains it as a word, so it would be a silent 0.
    """
    from stoney_rl.lexemes import contains_form

    check_targets(predictions, targets)
    values = []
    for prediction, forms in zip(predictions, targets, strict=True):
        asked = {fold(form): form for form in forms or []}
        hits = sum(contains_form(prediction, form) for form in asked.values())
        values.append(hits / len(asked) if asked else None)
    return values


def check_targets(predictions: Sequence[str], targets: Sequence[Sequence[str] | None]) -> None:
    """Raise StoneyError unless there is one prediction (a string) and one list of asked forms, or None, for each row."""
    check_texts("predictions", predictions)
    if isinstance(targets, str) or len(predictions) != len(targets):
        raise StoneyError(
            f"{len(predictions)} predictions but {len(targets)} lists of asked forms: expected one list (or None) "
            "for each prediction, in the same order"
        )
    for index, forms in enumerate(targets):
        check_forms(f"targets[{index}]", forms)


def check_forms(name: str, forms: Sequence[str] | None) -> None:
    """Raise StoneyError unless ``forms`` is None or a list of strings with at least one word each."""
    if forms is None:
        return
    if isinstance(forms, str) or not isinstance(forms, (list, tuple)):
        raise StoneyError(f"{name}: expected a list of forms or None, got {type(forms).__name__}")
    for form in forms:
        if not isinstance(form, str) or not words(form):
            raise StoneyError(f"{name}: expected forms with letters, got {form!r}; leave it out of the list")


def count_unscored(values: Sequence[float | None]) -> int:
    """How many rows have no value."""
    return sum(value is None for value in values)
