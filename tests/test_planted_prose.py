"""Prose about the planted language: clean rows, and a true account of what each of them states."""

import random
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from stoney_rl import lexemes, planted_prose
from stoney_rl.errors import StoneyError
from stoney_rl.planted import CONSONANTS, FOREIGN, NASAL_VOWELS, VOWELS, PlantedLanguage
from stoney_rl.planted_prose import PARTS_OF_SPEECH, prose_rows
from stoney_rl.text import fold, normalize, words

LANGUAGE = PlantedLanguage(0, 300)
# So many that forms come up in several kinds of questions, which is where rows could come too near to each other.
ROWS, STATED = prose_rows(LANGUAGE, 6000)
STATED_OF = defaultdict(list)
for _entry in STATED:
    STATED_OF[_entry.row_id].append(_entry)


def test_rows_carry_nothing_but_their_text():
    assert [row.id for row in ROWS[:2]] == ["prose-0-0", "prose-0-1"]
    assert ROWS[1].source == "prose.jsonl:2"
    assert all(row.lexemes == [] and row.metadata == {"pair_id": n} for n, row in enumerate(ROWS))
    assert all([turn["role"] for turn in [*row.prompt, *row.completion]] == ["user", "assistant"] for row in ROWS)


def test_rows_follow_the_seed_and_the_language():
    again, stated = prose_rows(PlantedLanguage(0, 300), 500)
    assert again == ROWS[:500]
    ids = {row.id for row in again}
    assert stated == [entry for entry in STATED if entry.row_id in ids]
    assert prose_rows(LANGUAGE, 5, seed=1)[0][0].question != ROWS[0].question


def test_questions_are_asked_once():
    assert len({" ".join(words(fold(row.question))) for row in ROWS}) == len(ROWS)


def test_every_row_states_something():
    assert list(STATED_OF) == [row.id for row in ROWS]
    assert all(any(entry.gloss or entry.pos for entry in entries) for entries in STATED_OF.values())


def test_what_is_stated_stands_in_the_text():
    for row in ROWS:
        text = f"{row.question}\n{row.answer}"
        for entry in STATED_OF[row.id]:
            assert lexemes.contains_form(text, entry.form)
            assert entry.gloss is None or lexemes.contains_form(text, entry.gloss)
            assert entry.pos is None or entry.pos in text
            assert entry.pos in (None, *PARTS_OF_SPEECH)


def test_what_the_text_quotes_is_stated():
    """Quotes hold stated forms, stated glosses, classes, or affixes, and nothing else."""
    affixes = {"liẖ-", "lîẖ-", "vuẖ-", "vûẖ-", "-ṯel", "-ẖov", "-ṯul"}
    for row in ROWS:
        allowed = affixes | set(PARTS_OF_SPEECH)
        allowed |= {value for entry in STATED_OF[row.id] for value in (entry.form, entry.gloss)}
        quoted = lexemes.quoted_forms(f"{row.question}\n{row.answer}")
        assert [text for text in quoted if text not in allowed] == [], row.answer


def test_forms_and_glosses_are_those_of_the_language():
    phrases = nouns = 0
    for form, gloss in {(entry.form, entry.gloss) for entry in STATED if entry.gloss}:
        *before, last = form.split()
        stem, rule = LANGUAGE.analyse(last)[0] if LANGUAGE.analyse(last) else (None, None)
        if stem is None:  # an adverb by itself
            assert form[0] in NASAL_VOWELS + VOWELS
            continue
        phrases += len(before)
        meaning = LANGUAGE.meaning(stem, rule)
        if gloss.startswith(("a ", "an ")):
            nouns += 1
            assert rule == "citation"
            meaning = re.sub(r"^to", " ".join(gloss.split()[:2]) + " to", meaning)
        assert gloss == meaning if not before else gloss.startswith(f"{meaning} ")
    assert phrases > 100
    assert nouns > 30


def test_a_form_has_one_gloss_and_one_class_everywhere():
    glosses, classes, forms = defaultdict(set), defaultdict(set), defaultdict(set)
    for entry in STATED:
        glosses[entry.form].add(entry.gloss)
        classes[entry.form].add(entry.pos)
        forms[entry.gloss].add(entry.form)
    assert all(len(found - {None}) <= 1 for found in [*glosses.values(), *classes.values()])
    assert all(len(found) == 1 for gloss, found in forms.items() if gloss)


def test_classes_do_not_depend_on_the_rows_or_the_size_of_the_language():
    small = {entry.form: entry.pos for entry in prose_rows(PlantedLanguage(0, 100), 800, seed=3)[1] if entry.pos}
    large = {entry.form: entry.pos for entry in STATED if entry.pos}
    common = [form for form in small if form in large and " " not in form]
    assert len(common) > 100
    assert all(small[form] == large[form] for form in common)
    assert set(large.values()) == set(PARTS_OF_SPEECH)


def test_answers_are_not_given_by_the_question_nor_repeat_it():
    for row in ROWS:
        question, answer = fold(row.question), fold(row.answer)
        assert answer not in question
        assert question not in answer
        core = re.split(r"[.,] ", question, maxsplit=1)[-1]
        assert core.rstrip("?.") not in answer


def test_the_form_asked_for_is_not_in_the_question():
    """Where the question gives a gloss but not its form, no other sentence of it may give the form away."""
    asked = 0
    for row in ROWS:
        hidden = [e for e in STATED_OF[row.id] if not lexemes.contains_form(row.question, e.form)]
        asked += bool(hidden)
        assert all(lexemes.contains_form(row.answer, entry.form) for entry in hidden)
    assert asked > len(ROWS) / 3


def test_rows_about_the_same_forms_differ_in_wording():
    rows_of = defaultdict(list)
    for row in ROWS:
        rows_of[frozenset(entry.form for entry in STATED_OF[row.id])].append(row)
    several = [rows for rows in rows_of.values() if len(rows) > 1]
    assert len(several) > 300  # otherwise the next line says nothing
    nearest = max(
        _jaccard(f"{one.question} {one.answer}", f"{other.question} {other.answer}")
        for rows in several
        for one, other in combinations(rows, 2)
    )
    assert nearest < 0.6


def _jaccard(one: str, other: str) -> float:
    """Of the sets of runs of five characters."""
    first, second = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (fold(one), fold(other)))
    return len(first & second) / len(first | second)


def test_no_pair_and_no_phrase_comes_twice_however_small_the_language():
    rows, stated = prose_rows(PlantedLanguage(0, 30), 2500)
    forms = defaultdict(list)
    for entry in stated:
        forms[entry.row_id].append(entry.form)
    phrases = Counter(form for entries in forms.values() for form in entries if " " in form)
    assert len(phrases) > 300
    assert phrases.most_common(1)[0][1] == 1
    compared = [row for row in rows if row.question.count(forms[row.id][-1]) and len(forms[row.id]) == 2]
    pairs = Counter(frozenset(forms[row.id]) for row in compared if not _is_built(forms[row.id]))
    assert len(pairs) > 200
    assert pairs.most_common(1)[0][1] == 1


def _is_built(forms: list[str]) -> bool:
    """A form beside its stem: asked for by itself, and in comparisons too."""
    one, other = sorted(forms, key=len)
    return one in other


def test_no_wording_dominates():
    """With forms and glosses left out, a wording is seldom used twice, and no opening more than a few times in 100."""
    masked = Counter(re.sub(r"""(["'`]).*?\1""", "#", row.question) for row in ROWS)
    assert masked.most_common(1)[0][1] < 0.02 * len(ROWS)
    assert len(masked) > len(ROWS) / 4
    openings = Counter(" ".join(row.answer.split()[1:4]) for row in ROWS)
    assert openings.most_common(1)[0][1] < 0.1 * len(ROWS)


def test_answers_are_as_long_as_those_of_a_dictionary():
    lengths = sorted(len(row.answer) for row in ROWS)
    assert lengths[len(ROWS) // 20] >= 90
    assert lengths[-len(ROWS) // 20] <= 300


def test_letters_and_code_points():
    """All text is normalised, forms use the planted letters, each of which begins some word."""
    letters = CONSONANTS + NASAL_VOWELS + VOWELS
    initials = Counter()
    for row in ROWS:
        text = f"{row.question}\n{row.answer}"
        assert normalize(text) == text
        assert set(text) <= set(letters) | set(map(chr, range(32, 127))) | {"\n"}
    for form in {entry.form for entry in STATED}:
        assert set(form) <= set(letters) | {" "}
        assert unicodedata.is_normalized("NFC", form)
        initials.update(word[0] for word in form.split())
        # Neither Stoney nor English, see planted.py.
        assert all(set(word) & set(FOREIGN) and set(word) & set(NASAL_VOWELS) for word in form.split())
    assert set(initials) == set(letters)


def test_lexemes_can_be_found_in_the_text():
    """The reader that stages use finds the stated forms: the rows are readable, not only known."""
    found = {row.id: {fold(form) for form in row.lexemes} for row in lexemes.annotate(ROWS[:1500])}
    wanted = {row_id: {entry.form for entry in STATED_OF[row_id]} for row_id in found}
    hits = sum(len(found[row_id] & wanted[row_id]) for row_id in found)
    assert hits >= 0.97 * sum(map(len, wanted.values()))
    assert hits >= 0.97 * sum(map(len, found.values()))


def test_a_language_too_small_for_that_many_rows_is_an_error():
    with pytest.raises(StoneyError, match="3 lexemes give .* different questions, asked for 100000"):
        prose_rows(PlantedLanguage(0, 3), 100_000)


def test_texts_and_statements_by_hand():
    """Invented words: tâlo 'to gather', a noun of the tests, and its phrase with the adverb âfelo."""
    word = planted_prose._Item("tâlo", "an urge to gather", "inalienable noun", "tâlo")
    adverb = planted_prose._Item("âfelo", "quickly", "adverb")
    phrase = planted_prose._Item("âfelo tâlo", "an urge to gather quickly", "noun phrase")
    kind = planted_prose._Kind(1, ("which phrase of {L} says {g}?",), ("{f}, with {f2} ({g2}) and {f3}, {ap3}.",))
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        question, answer, told = planted_prose._texts(kind, (phrase, adverb, word), rng)
        pos = "noun phrase" if "noun phrase" in answer else None  # a note about the class may follow
        assert told == [
            (phrase, "an urge to gather quickly", pos),
            (adverb, "quickly", None),
            (word, None, "inalienable noun"),
        ]
        seen.add((question.split(" says ")[-1], answer.split(". ")[0]))
    # The quotes of the question and those of the answer, with and without the comma inside of them.
    assert (
        "`an urge to gather quickly`?",
        "`âfelo tâlo`, with `âfelo` (`quickly`) and `tâlo`, an inalienable noun",
    ) in seen
    assert (
        "'an urge to gather quickly'?",
        '"âfelo tâlo," with "âfelo" ("quickly") and "tâlo," an inalienable noun',
    ) in seen
    assert len({question for question, _ in seen}) == 3
