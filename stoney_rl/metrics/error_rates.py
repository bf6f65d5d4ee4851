"""Three error rates, each a share in [0, 1] for one row (0 is best): wrong diacritics, wrong affixes, invented words.

Each names what it can't score, and a row that it can't score is None. The words and segmentations are those of the
reward terms (``rewards.terms``), so that training and evaluation never disagree about what a form is.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from stoney_rl.metrics.checks import NORM_SIGNATURE, check_column
from stoney_rl.metrics.forms import check_targets
from stoney_rl.rewards import terms
from stoney_rl.rewards.knowledge import Knowledge, folded_words, language_words

DIACRITIC_SIGNATURE = f"diacritic-error|letters:marked-in-either|forms:same-base|avg:row|case:folded|{NORM_SIGNATURE}"
MORPHOLOGY_SIGNATURE = f"morphology-error|affixes:in-place-on-stem|avg:row|case:folded|{NORM_SIGNATURE}"
HALLUCINATION_SIGNATURE = f"hallucinated-form|attested:lexicon+row|avg:row|case:folded|{NORM_SIGNATURE}"

Letters = tuple[tuple[str, str], ...]


def diacritic_error_rate(*, predictions: Sequence[str], targets: Sequence[Sequence[str] | None]) -> list[float | None]:
    """For each row the share of marked letters whose marks are wrong, in the asked forms whose base letters are right.

    A form is found in the prediction where the words without their combining marks are the same (letters in NFD, case
    folded); of several such places the one with the fewest errors counts. Over those forms: letters whose marks
    differ / letters that have a mark in the form or in the prediction. Without the mark on â, ``talo`` for ``tâlo`` is 1.

    After the diacritic error rate of restoration (Zitouni, Sorensen and Sarikaya 2006, https://aclanthology.org/P06-1073),
    where the base letters are given, and which divides by all letters: here most letters never bear a mark. None
    where no asked form bears a mark, and where the base letters of none are there: that is another error, which form
    accuracy counts. Raises StoneyError as ``forms.form_accuracy``.
    """
    check_targets(predictions, targets)
    values: list[float | None] = []
    for prediction, forms in zip(predictions, targets, strict=True):
        found = [_mark_errors(folded_words(prediction), folded_words(form)) for form in forms or []]
        wrong, marked = (sum(counts) for counts in zip((0, 0), *filter(None, found), strict=True))
        values.append(wrong / marked if marked else None)
    return values


def morphology_error_rate(
    *, predictions: Sequence[str], targets: Sequence[Sequence[str] | None], knowledge: Knowledge
) -> list[float | None]:
    """For each row the share of the affixes that its asked forms need which are missing, wrong or out of place.

    1 - R_morph (``terms.morphology``): affixes count only around the right stem, diacritics exact, so that an answer
    without the stem has every affix wrong. None where no asked form has a known segmentation with an affix.
    """
    check_targets(predictions, targets)
    right = terms.morphology(predictions, [forms or () for forms in targets], knowledge)
    return [None if share is None else 1 - share for share in right]


def hallucinated_form_rate(
    *, predictions: Sequence[str], references: Sequence[str], questions: Sequence[str], knowledge: Knowledge
) -> list[float | None]:
    """For each row the share of the prediction's words of the language that nothing attests (``terms.hallucination``).

    Attested are the words and morphs of the lexicon, and the words of the row's own question and reference. A real
    form that the lexicon lacks counts as invented. None where the prediction has no word of the language.
    """
    check_column("predictions", predictions)
    check_column("references", references, len(predictions))
    check_column("questions", questions, len(predictions))
    allowed = [
        {*language_words(question), *language_words(reference)}
        for question, reference in zip(questions, references, strict=True)
    ]
    return terms.hallucination(predictions, allowed, knowledge)


def _mark_errors(prediction: tuple[str, ...], form: tuple[str, ...]) -> tuple[int, int] | None:
    """(letters whose marks differ, letters with a mark in either) at the best place of the form in the prediction.

    None for a form without marks, or whose base letters are nowhere.
    """
    gold = [letters(word) for word in form]
    if not any(marks for word in gold for _, marks in word):
        return None
    places = []
    for start in range(len(prediction) - len(form) + 1):
        given = [letters(word) for word in prediction[start : start + len(form)]]
        if [_base(word) for word in given] == [_base(word) for word in gold]:
            pairs = [
                (a, b)
                for ours, theirs in zip(given, gold, strict=True)
                for (_, a), (_, b) in zip(ours, theirs, strict=True)
            ]
            places.append((sum(a != b for a, b in pairs), sum(bool(a or b) for a, b in pairs)))
    return min(places, default=None)


@lru_cache(maxsize=1 << 16)
def letters(text: str) -> Letters:
    """The characters of ``text`` in NFD, each with its combining marks: ``tâ`` -> ("t", ""), ("a", "\u0302").

    Joined and normalised, they are ``text`` again.
    """
    found: list[tuple[str, str]] = []
    for character in unicodedata.normalize("NFD", text):
        if unicodedata.combining(character) and found:
            base, marks = found.pop()
            found.append((base, marks + character))
        else:
            found.append((character, ""))
    return tuple(found)


def _base(word: Letters) -> str:
    return "".join(base for base, _ in word)
