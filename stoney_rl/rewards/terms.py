"""The terms of the reward, each a pure function on lists: one value a row, None where there is nothing to score.

Answers are ``completions.parse(...).answer``; questions and references are normalised rows; a row's ``wanted`` are the
forms that it asks for (``lexemes.target_forms``), an empty list where the answer is English. README.md beside this file
works an example of each by hand and says what each can't see.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

from stoney_rl.lexemes import contains_form
from stoney_rl.metrics import chrf
from stoney_rl.rewards.knowledge import Knowledge, folded_words, language_words
from stoney_rl.text import fold, normalize, words

# R_dict of an answer that tries: an attested form of up to so many words, the wrong one.
ATTEMPT, ATTEMPT_WORDS = 0.1, 3
MAX_REPEATS = 3  # times that a wanted form may stand in an answer, as it does in a sentence that explains it
MAX_REASONING_WORDS = 200
# An answer may be twice as long as the reference, or this many characters longer; at twice that it earns nothing.
FREE_LENGTH, FREE_CHARACTERS = 2.0, 120

Values = list[float | None]


def lexical(answers: Sequence[str], references: Sequence[str], questions: Sequence[str]) -> Values:
    """R_lex in [0, 1]: sentence chrF++ with the reference, above what copying the question earns.

    max(0, (c - f) / (1 - f)) with c = chrF++(answer, reference) / 100 and f = chrF++(question, reference) / 100
    (chrF++: Popović 2017, ``metrics.chrf``). The gold answer earns 1, an echo of the question 0. None where the
    reference has no word: an unreadable reference can't be matched.
    """
    values: Values = []
    for answer, reference, question in zip(answers, references, questions, strict=True):
        floor = _floor(question, reference) if words(reference) else 1.0
        # A question that is its own answer leaves nothing to earn.
        values.append(max(0.0, (_chrf(answer, reference) - floor) / (1 - floor)) if floor < 1 else None)
    return values


@lru_cache(maxsize=1 << 16)
def _floor(question: str, reference: str) -> float:
    return _chrf(question, reference)


def _chrf(text: str, reference: str) -> float:
    """Sentence chrF++ in [0, 1], the same number as ``metrics.chrf`` gives."""
    return _metric(normalize(reference)).corpus_score([normalize(text)], None).score / 100


@lru_cache(maxsize=256)
def _metric(reference: str):
    """sacreBLEU's chrF++ with the n-grams of one reference counted, once for the completions of its group."""
    from sacrebleu.metrics import CHRF

    return CHRF(char_order=chrf.CHAR_ORDER, word_order=chrf.WORD_ORDER, beta=chrf.BETA, references=[[reference]])


def semantic(
    answers: Sequence[str],
    references: Sequence[str],
    questions: Sequence[str],
    similarity: Callable[[list[str], list[str], list[str]], list[float]] | None,
) -> Values:
    """R_sem in [0, 1]: how alike answer and reference are in meaning, as ``similarity`` has it (``rewards.similarity``).

    None without one, and where the reference has no word.
    """
    values: Values = [None] * len(answers)
    usable = [row for row, reference in enumerate(references) if similarity and words(reference)]
    if usable:
        columns = ([column[row] for row in usable] for column in (questions, answers, references))
        for row, value in zip(usable, similarity(*columns), strict=True):
            values[row] = value
    return values


def dictionary(
    answers: Sequence[str],
    references: Sequence[str],
    wanted: Sequence[Sequence[str]],
    allowed: Sequence[Sequence[str]],
    knowledge: Knowledge,
) -> Values:
    """R_dict in [0, 1]: are the forms asked for there, and no others?

    s + (1 - s) t with s = min(``precision``, ``hit``), which is right / max(asked for, named). t: ATTEMPT, if the answer has
    other words of the language and all are attested, times ATTEMPT_WORDS / their number where there are more of them; else
    0. Naming k forms with the right one among them earns at most what guessing one of the k earns on average. None for a
    row that asks for no form.
    """
    values: Values = []
    precisions = precision(answers, references, wanted, allowed, knowledge)
    for answer, forms, own, exact, found in zip(
        answers, wanted, allowed, precisions, hit(answers, wanted), strict=True
    ):
        if exact is None or found is None:
            values.append(None)
            continue
        others = _others(answer, forms, own, knowledge)
        tried = ATTEMPT * min(1.0, ATTEMPT_WORDS / len(others)) if others and others <= knowledge.attested else 0.0
        share = min(exact, found)
        values.append(share + (1 - share) * tried)
    return values


def hit(answers: Sequence[str], wanted: Sequence[Sequence[str]]) -> Values:
    """The recall of the wanted forms: the share of them that stand in the answer, in [0, 1]; None for a row that asks for
    no form."""
    return [
        sum(contains_form(answer, form) for form in forms) / len(forms) if forms else None
        for answer, forms in zip(answers, wanted, strict=True)
    ]


def precision(
    answers: Sequence[str],
    references: Sequence[str],
    wanted: Sequence[Sequence[str]],
    allowed: Sequence[Sequence[str]],
    knowledge: Knowledge,
) -> Values:
    """The precision of the wanted forms, in [0, 1]: h / (h + e) for h of them in the answer and e others beside them.

    e counts the different words that look like the language's and are neither wanted, nor ``allowed`` (of the question or
    the reference), nor affixes that the lexicon names; and each time that a word of a wanted form stands there more than
    ``MAX_REPEATS`` times and more often than in the reference. 0 without a wanted form, None for a row that asks for none.
    """
    values: Values = []
    for answer, reference, forms, own in zip(answers, references, wanted, allowed, strict=True):
        found = sum(contains_form(answer, form) for form in forms)
        extra = len(_others(answer, forms, own, knowledge)) + _repeats(answer, reference, forms) if found else 0
        values.append((found / (found + extra) if found else 0.0) if forms else None)
    return values


def _others(answer: str, forms: Sequence[str], own: Sequence[str], knowledge: Knowledge) -> set[str]:
    """Words of the answer that look like the language's and are nobody's. An affix explains a form, and is none."""
    others = set(language_words(answer)).difference(own, *map(folded_words, forms))
    return {word for word in others if word in knowledge.attested or word not in knowledge.morphs}


def _repeats(answer: str, reference: str, forms: Sequence[str]) -> int:
    """How often words of the wanted forms stand in the answer beyond the limit."""
    found, given = language_words(answer), language_words(reference)
    mine = {word for form in forms for word in folded_words(form)}
    return sum(max(0, found.count(word) - max(MAX_REPEATS, given.count(word))) for word in mine)


def morphology(answers: Sequence[str], wanted: Sequence[Sequence[str]], knowledge: Knowledge) -> Values:
    """R_morph in [0, 1]: the affixes that the wanted form needs, on the right stem, diacritics exact.

    For each wanted form with a known segmentation of at least two morphs: the best word of the answer that holds the
    stem, scored by the share of the other morphs that stand at their place, before or after it, side by side; 1 for the
    form itself, 0 without the stem. The mean over such forms; None where there is none: an empty list of affixes earns
    nothing and loses nothing.
    """
    values: Values = []
    for answer, forms in zip(answers, wanted, strict=True):
        scores = [
            1.0
            if contains_form(answer, key)
            else max((_affixes(word, key, knowledge) for word in folded_words(answer)), default=0.0)
            for key in map(fold, forms)
            if len(knowledge.segments.get(key, ())) > 1
        ]
        values.append(sum(scores) / len(scores) if scores else None)
    return values


def _affixes(word: str, form: str, knowledge: Knowledge) -> float:
    """The share of the form's affixes that ``word`` has in their places around the form's stem."""
    segments, stem = knowledge.segments[form], knowledge.stems[form]
    if stem not in segments or stem not in word:
        return 0.0
    at = len(segments) - 1 - segments[::-1].index(stem)  # of a reduplicated stem, the whole one is the last
    right, start = 0, word.rindex(stem)
    before, after = word[:start], word[start + len(stem) :]
    for morph in reversed(segments[:at]):
        if not before.endswith(morph):
            break
        before, right = before.removesuffix(morph), right + 1
    for morph in segments[at + 1 :]:
        if not after.startswith(morph):
            break
        after, right = after.removeprefix(morph), right + 1
    return right / (len(segments) - 1)


def hallucination(answers: Sequence[str], allowed: Sequence[Sequence[str]], knowledge: Knowledge) -> Values:
    """P_hall in [0, 1], a penalty: the share of the answer's words of the language that nothing attests.

    A word is attested by the lexicon (an affix that it names, too), or ``allowed`` (of the question or the reference).
    None where the answer has no word that looks like the language's.
    """
    values: Values = []
    for answer, own in zip(answers, allowed, strict=True):
        found = language_words(answer)
        invented = [word for word in found if not knowledge.has(word) and word not in own]
        values.append(len(invented) / len(found) if found else None)
    return values


def reasoning(
    traces: Sequence[str | None], answers: Sequence[str], allowed: Sequence[Sequence[str]], knowledge: Knowledge
) -> Values:
    """R_cot in [0, 1]: the trace is bounded, grounded, and leads to the answer; None without a trace.

    bounded x grounded x consistent: 1 up to ``MAX_REASONING_WORDS`` words, falling to 0 at twice that; the share of the
    trace's words of the language that are attested or allowed (0 if it has none while the answer has some); the share of
    the answer's words of the language that the trace arrived at.
    """
    values: Values = []
    for trace, answer, own in zip(traces, answers, allowed, strict=True):
        if trace is None:
            values.append(None)
            continue
        bounded = _falling(len(words(trace)), MAX_REASONING_WORDS)
        used, given = language_words(trace), set(language_words(answer))
        known = [word for word in used if knowledge.has(word) or word in own]
        grounded = len(known) / len(used) if used else float(not given)
        consistent = len(given & set(used)) / len(given) if given else 1.0
        values.append(bounded * grounded * consistent if words(trace) and answer else 0.0)
    return values


def brevity(answers: Sequence[str], references: Sequence[str]) -> Values:
    """R_brev in [0, 1]: 1 up to the free length, falling to 0 at twice that; 0 for no answer.

    Free are the larger of ``FREE_LENGTH`` times the reference and ``FREE_CHARACTERS`` more than it, in characters.
    """
    return [
        _falling(len(answer), max(FREE_LENGTH * len(reference), len(reference) + FREE_CHARACTERS)) if answer else 0.0
        for answer, reference in zip(answers, references, strict=True)
    ]


def _falling(length: int, free: float) -> float:
    return max(0.0, min(1.0, 2 - length / free)) if free else 0.0
