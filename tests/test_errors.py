"""Classes of misses: each definition by hand, and planted errors found again. All words are of the planted language."""

import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from stoney_rl import planted
from stoney_rl.data import load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import contains_form
from stoney_rl.lexicon import LexiconEntry, read_lexicon
from stoney_rl.metrics import errors
from stoney_rl.predictions import record

PLANTED = Path(__file__).parents[1] / "data" / "planted"


def entry(stem, rule="citation", count=1):
    morphs = planted.segments(stem, rule)
    return LexiconEntry(
        "".join(morphs), pos=(("verb", 1),), count=count, stem=stem, segmentation=("~" if rule == "reduplication" else "-").join(morphs)
    )  # fmt: skip


RULES = ("citation", *planted.RULES)
ATTESTED = errors.Attested.of([entry(stem, rule) for stem in ("tâlo", "mîva", "sâfe") for rule in RULES])


def row(prediction, *forms, question='The verb "tâlo" means "gather". What is "they gather"?', **other):
    reference = ", ".join(f'"{form}"' for form in forms or ["to gather"]) + "."
    return {
        "id": "r", "prompt": question, "reference": reference, "prediction": prediction, "seen": False,
        "forms": list(forms) or None, "lexemes": ["tâlo"], "truncated": False,
    } | other  # fmt: skip


def classed(prediction, *forms, attested=ATTESTED, **other):
    [found] = errors.classify([row(prediction, *forms, **other)], attested)
    return found["class"], found["given"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        # The row asks for tâloṯel, 'they gather'.
        ("taloṯel", ("diacritic only", "taloṯel")),
        ("The form is tâlotel.", ("diacritic only", "tâlotel")),
        ('"Tãloṯel".', ("diacritic only", "tãloṯel")),
        ("tâlôṯel", ("diacritic only", "tâlôṯel")),
        ("tâlоṯel", ("look-alike letter", "tâlоṯel")),  # Cyrillic o
        ('One says "tâloṯeI".', ("affix", "tâloṯei")),  # a capital i is an i when case is folded, not an l
        ("tâl0ṯel", ("look-alike letter", "tâl0ṯel")),
        ("tâlot\u0332el", ("look-alike letter", "tâlot\u0332el")),  # a low line for the macron below
        ("tаloṯel", ("look-alike letter", "tаloṯel")),  # Cyrillic a, and its mark is lost
        ("tâloẖov", ("affix", "tâloẖov")),
        ("tâlobek", ("affix", "tâlobek")),
        ("liẖtâloṯel", ("affix", "liẖtâloṯel")),
        ('"tâlo".', ("affix", "tâlo")),
        ("mîvaṯel", ("stem", "mîvaṯel")),
        ("zûgefeṯel", ("stem", "zûgefeṯel")),
        ("-ṯel", ("stem", "ṯel")),
        ('The verb "tâlo" makes "mîvaṯel".', ("stem", "mîvaṯel")),
        ("mîvaẖov", ("other attested form", "mîvaẖov")),
        ("mîvaẖov or sâfe", ("other attested form", "mîvaẖov")),
        ("zûgefe", ("invented form", "zûgefe")),
        ("mîvaẖov, zûgefe", ("invented form", "zûgefe")),
        ('In Zuvork they say "sâfe".', ("other attested form", "sâfe")),
        ("It means many people who gather.", ("English only", None)),
        ('"gather".', ("English only", None)),
        ("I'm sorry, I don't know this word.", ("refusal", None)),
        ("I’m sorry. I don’t know.", ("refusal", None)),
        ('I cannot translate "tâlo".', ("refusal", None)),
        ('I am not sure, perhaps "mîvaẖov".', ("other attested form", "mîvaẖov")),
        ('It means "to be sorry".', ("English only", None)),
        ("", ("empty", None)),
        ("... 12?", ("empty", None)),
        (" \u200b\n", ("empty", None)),
    ],
)  # fmt: skip
def test_definitions_by_hand(prediction, expected):
    assert classed(prediction, "tâloṯel") == expected
    decomposed = unicodedata.normalize("NFD", prediction)
    assert classed(decomposed, "tâloṯel") == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ('The form is "tâloṯ', ("truncated", "tâloṯ")),
        ('The form is "tâlo', ("truncated", "tâlo")),
        ("Well, this is a question of how people", ("truncated", None)),
        ('The verb "tâlo" means', ("truncated", None)),
        ("I don't know, but let me", ("truncated", None)),
        ('It is "mîvaṯel", as one says of people', ("stem", "mîvaṯel")),
        ('It is "tâlo", as one says of people who', ("truncated", None)),
    ],
)
def test_cut_answers(prediction, expected):
    assert classed(prediction, "tâloṯel", truncated=True) == expected
    assert classed(prediction, "tâloṯel", truncated=False)[0] != "truncated"


def test_other_rules():
    # Reduplication: the copy belongs to whatever stem was given.
    assert classed("mîmîva", "tâtâlo") == ("stem", "mîmîva")
    assert classed("zûzûgefe", "tâtâlo") == ("stem", "zûzûgefe")
    assert classed("mîva", "tâtâlo") == ("other attested form", "mîva")
    assert classed("tâfike", "tâtâlo") == ("invented form", "tâfike"), "its beginning alone is no reduplication"
    # The prefix of tâlo is liẖ-, that of mîva lîẖ-: one prefix.
    assert classed("lîẖmîva", "liẖtâlo") == ("stem", "lîẖmîva")
    assert classed("vûẖmîva", "liẖtâlo") == ("other attested form", "vûẖmîva")
    # The wrong vowel before a nasal is a mark.
    assert classed("liẖmîva", "lîẖmîva") == ("diacritic only", "liẖmîva")
    # A bare stem is asked for: an affix too many, and no affix that could be right.
    assert classed("tâloṯel", "tâlo", question="?") == ("affix", "tâloṯel")
    assert classed("mîva", "tâlo") == ("other attested form", "mîva")


def test_a_stem_inside_another_stem_is_no_right_stem():
    attested = errors.Attested.of([entry("tâlo", "plural"), entry("tâlobi")])
    assert classed("tâlobi", "tâloṯel", attested=attested) == ("other attested form", "tâlobi")
    assert classed("tâlobik", "tâloṯel", attested=attested) == ("affix", "tâlobik"), "of an unknown word, it may be"
    short = errors.Attested.of([entry("tâ", "plural")])
    assert classed("mîtâfe", "tâṯel", attested=short) == ("invented form", "mîtâfe"), "two letters prove no stem"


def test_words_of_the_question_are_attempts_only_where_nothing_else_is():
    asked = 'Is "mîvaẖov" or "zûgefe" the word for "they gather"?'
    assert classed('It is "mîvaẖov".', "tâloṯel", question=asked) == ("other attested form", "mîvaẖov")
    assert classed('It is "zûgefe".', "tâloṯel", question=asked) == ("other attested form", "zûgefe")
    assert classed('Not "mîvaẖov" but "sûlike".', "tâloṯel", question=asked) == ("invented form", "sûlike")


def test_several_forms_are_classed_by_the_nearest_miss():
    assert classed("tâloṯel", "tâloṯel", "mîvaẖov") == ("incomplete", None)
    assert classed("tâloṯel, mivahov", "tâloṯel", "mîvaẖov") == ("diacritic only", "mivahov")
    assert classed("sâfeẖov, tâlo", "tâloṯel", "mîvaẖov", question="?") == ("affix", "tâlo")
    [found] = errors.classify([row("zûgefe, mivahov", "tâloṯel", "mîvaẖov")], ATTESTED)
    assert (found["class"], found["wanted"]) == ("diacritic only", "mîvaẖov")
    assert errors.classify([row("tâloṯel mîvaẖov", "tâloṯel", "mîvaẖov")], ATTESTED)[0]["status"] == errors.HIT


def test_phrases_are_compared_word_by_word():
    assert classed('One says "tâlo miva".', "tâlo mîva", question="?") == ("diacritic only", "tâlo miva")
    assert classed("tâlo, mîvа", "tâlo mîva", question="?") == ("look-alike letter", "tâlo mîvа")


def test_an_english_spelling_is_an_attempt_only_in_quotes_or_alone():
    attested = errors.Attested.of([entry("hâle")])
    assert classed("Hale", "hâle", attested=attested) == ("diacritic only", "hale")
    assert classed('The word for this is "hale".', "hâle", attested=attested) == ("diacritic only", "hale")
    assert classed("They were hale people in those days.", "hâle", attested=attested) == ("English only", None)


def test_without_segmentations_there_is_no_affix_and_no_stem():
    attested = errors.Attested.of([LexiconEntry(form) for form in ("tâlo", "tâloṯel", "mîvaṯel")])
    assert classed("tâlo", "tâloṯel", attested=attested, question="?")[0] == "other attested form"
    assert classed("zûgefeṯel", "tâloṯel", attested=attested)[0] == "invented form"


def test_what_has_no_class():
    rows = [
        row("tâloṯel", "tâloṯel"),
        row(None, "tâloṯel"),
        row("to gather", question='What does "tâlo" mean?'),
        row("It is used every day.", question='How is "tâlo" used?'),
    ]
    found = errors.classify(rows, ATTESTED)
    assert [one["status"] for one in found] == ["hit", "unscored", "no form asked", "no form asked"]
    assert [one["class"] for one in found] == [None] * 4
    assert [one["kind"] for one in found] == ["form wanted", "form wanted", "meaning asked", "other"]


def test_part_of_speech_and_kind_come_from_the_metadata_first():
    rows = [row("zûgefe", "tâloṯel") | {"id": name} for name in "ab"]
    found = errors.classify(
        rows, ATTESTED, metadata={"a": {"pos": "noun", "category": "kinship", "question_type": " "}}
    )
    assert [(one["pos"], one["kind"]) for one in found] == [("noun", "kinship"), ("verb", "form wanted")]
    [unknown] = errors.classify([row("x", "bûlo") | {"lexemes": [], "seen": None}], ATTESTED)
    assert (unknown["pos"], unknown["seen"]) == ("unknown", "unknown")


def test_nearest_attested_form():
    attested = errors.Attested.of(
        [LexiconEntry("tâlo", count=1), LexiconEntry("Tâla", count=9), LexiconEntry("mîvaṯel")]
    )
    assert attested.nearest("tâle") == ("Tâla", 1), "of equals, the one in more rows"
    assert attested.nearest("mîvatel") == ("mîvaṯel", 1), "a letter with its mark is one letter"
    assert attested.nearest("mîvab") is None, "two edits are too many for five letters"
    assert attested.nearest("mîvaku") is None
    same = errors.Attested.of([LexiconEntry("tâlo"), LexiconEntry("tâla")])
    assert same.nearest("tâle") == ("tâla", 1), "then the alphabet"
    [found] = errors.classify([row("tâlobi, zûgefe and sâfu", "lîẖmîva", question="?")], ATTESTED)
    assert found["class"] == "invented form"
    assert found["nearest"] == [
        {"given": "tâlobi", "form": "tâlo", "edits": 2},
        {"given": "sâfu", "form": "sâfe", "edits": 1},
    ]


def test_counts_by_hand():
    rows = [
        row("tâloṯel", "tâloṯel", seen=True),
        row("tâlo", "tâloṯel", seen=True),
        row("taloṯel", "tâloṯel"),
        row("", "tâloṯel"),
        row("to gather"),
        row(None, "tâloṯel"),
    ]
    counted = errors.counts(errors.classify(rows, ATTESTED))
    assert {key: counted[key] for key in ("rows", "asked", "hits", "misses", "no_form", "unscored")} == {
        "rows": 6, "asked": 4, "hits": 1, "misses": 3, "no_form": 1, "unscored": 1,
    }  # fmt: skip
    assert {key: value for key, value in counted["classes"].items() if value} == {
        "affix": 1, "diacritic only": 1, "empty": 1,
    }  # fmt: skip
    seen = counted["by"]["seen"]
    assert (seen["seen"]["asked"], seen["seen"]["hits"], seen["seen"]["classes"]["affix"]) == (2, 1, 1)
    assert (seen["unseen"]["asked"], seen["unseen"]["unscored"], seen["unseen"]["misses"]) == (2, 1, 2)
    assert counted["by"]["kind"]["other"]["no_form"] == 1
    text = errors.as_text(counted, "grpo")
    assert text.startswith("grpo: 3 of 4 answers lack a form they were asked for.")
    assert "Without a class, because they ask for no form: 1." in text
    columns, lines = errors.as_table(rows, errors.classify(rows, ATTESTED))
    assert len(lines) == 3 and all(len(line) == len(columns) for line in lines)
    assert [line[columns.index("class")] for line in lines] == ["affix", "diacritic only", "empty"]


def test_bad_input_is_refused():
    with pytest.raises(StoneyError, match="lexicon is empty"):
        errors.Attested.of([])
    with pytest.raises(StoneyError, match=r"predictions\[0\]: no seen, forms"):
        errors.classify([{"id": "a", "prompt": "?", "reference": "x", "prediction": "y"}], ATTESTED)


# Planted errors, found again.

LOOK_ALIKES = str.maketrans("aeopsihjy", "аеорѕіһју")  # Cyrillic
FRAMES = ('"{}".', "{}", 'The form is "{}".', "For this one says {}.")
ENGLISH = ("It means many people.", "They do it every day.", '"to gather".', "The answer is simple: they gather.")
REFUSALS = (
    "I'm sorry, I don't know.", 'I cannot answer that about "{stem}".', "I do not have enough information.",
    "I am not sure about this word.",
)  # fmt: skip
WAFFLE = ("Let me think about this question, which is", 'The verb "{stem}" means that', "First of all, the")


def corruptions(row, language, invented, rng):
    """class -> (text, whether it was cut) of one planted row; None where the row can't have that error."""
    form, stem, rule = (row.metadata[key] for key in ("form", "stem", "rule"))
    rule = "citation" if rule == planted.LOOKUP else rule
    other = rng.choice([one for one in language.stems if one != stem])
    new = rng.choice(invented)
    other_rule = rng.choice([one for one in planted.RULES if one != rule])
    decomposed = unicodedata.normalize("NFD", form)
    marks = [at for at, char in enumerate(decomposed) if unicodedata.combining(char)]
    at = rng.choice(marks)
    lost, changed = decomposed[:at] + decomposed[at + 1 :], decomposed[:at] + "\u0308" + decomposed[at + 1 :]
    bare = "".join(char for char in decomposed if not unicodedata.combining(char))
    letters = [index for index, char in enumerate(form) if char.translate(LOOK_ALIKES) != char]
    swap = rng.choice(letters) if letters else None
    affixes = [
        planted.inflect(stem, other_rule),
        stem + rng.choice(["bek", "ku"]),
        stem if rule != "citation" else stem + "ṯel",
    ]
    stems = [planted.inflect(other, rule), planted.inflect(new, rule)] if rule != "citation" else []
    cut = form[: rng.randrange(1, len(form))]
    framed = rng.choice(FRAMES).format
    return {
        "diacritic only": (framed(rng.choice([lost, changed, bare])), False),
        "look-alike letter": None if swap is None else (framed(form[:swap] + form[swap].translate(LOOK_ALIKES) + form[swap + 1 :]), False),
        "affix": (framed(rng.choice(affixes)), False),
        "stem": (framed(rng.choice(stems)), False) if stems else None,
        "other attested form": (framed(planted.inflect(other, other_rule)), False),
        "invented form": (framed(new), False),
        "English only": (rng.choice(ENGLISH), False),
        "refusal": (rng.choice(REFUSALS).format(stem=stem), False),
        "truncated": (rng.choice([f'The form is "{cut}', rng.choice(WAFFLE).format(stem=stem)]), True),
        "empty": (rng.choice(["", " ", "...", "?"]), False),
    }  # fmt: skip


@pytest.fixture(scope="module")
def planted_errors():
    """(class planted, class found, class found in NFD) of every row of the embedded sample and every class."""
    rng = random.Random(0)
    language = planted.PlantedLanguage(0, 165)
    invented = [stem for stem in planted.PlantedLanguage(7, 400).stems if stem not in language.stems]
    attested = errors.Attested.of(read_lexicon(PLANTED / "lexicon.jsonl"))
    rows = list(load_rows(str(PLANTED / "rows.jsonl")).rows)
    rows += [one for one in language.rows(lookup_fraction=1.0) if one.metadata["rule"] == planted.LOOKUP][:150]
    made = [
        (label, record(one, *text[:1], False, truncated=text[1]))
        for one in rows
        for label, text in corruptions(one, language, invented, rng).items()
        if text and not contains_form(text[0], one.metadata["form"])
    ]
    composed = errors.classify([line for _, line in made], attested)
    decomposed = errors.classify(
        [line | {"prediction": unicodedata.normalize("NFD", line["prediction"])} for _, line in made], attested
    )
    return [(label, a["class"], b["class"]) for (label, _), a, b in zip(made, composed, decomposed, strict=True)]


def test_planted_errors_are_found_again(planted_errors):
    planted_counts = Counter(label for label, _, _ in planted_errors)
    assert planted_counts.keys() == errors.CLASSES.keys() - {"incomplete"}
    assert min(planted_counts.values()) >= 900
    right = Counter(label for label, found, _ in planted_errors if label == found)
    found_counts = Counter(found for _, found, _ in planted_errors)
    recall = {label: right[label] / planted_counts[label] for label in planted_counts}
    precision = {label: right[label] / found_counts[label] for label in planted_counts}
    assert min(recall.values()) >= 0.98, recall
    assert min(precision.values()) >= 0.98, precision


def test_planted_errors_are_the_same_in_nfd(planted_errors):
    assert all(composed == decomposed for _, composed, decomposed in planted_errors)
