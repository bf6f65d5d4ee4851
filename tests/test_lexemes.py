"""The forms of a row, told from its English. All language forms are invented, but for the rows under real_data."""

import os
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoney_rl.data import Row, load_rows
from stoney_rl.lexemes import (
    _tokens,
    annotate,
    contains_form,
    english_test,
    extract_lexemes,
    quoted_forms,
    target_forms,
)
from stoney_rl.text import fold

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")


def row(question, answer, *, lexemes=(), row_id="r", **metadata):
    return Row(
        id=row_id,
        source="test:1",
        prompt=[{"role": "user", "content": question}],
        completion=[{"role": "assistant", "content": answer}],
        lexemes=list(lexemes),
        metadata=metadata,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\"tâlo\" means 'gather'.", ["tâlo", "gather"]),
        ("`tâlo ne mîva` and “mîva”", ["tâlo ne mîva", "mîva"]),
        ("\u2018tâlo\u2019 is the speaker's word", ["tâlo"]),
        ("don't say 'dada's tâlo', it isn't", ["dada's tâlo"]),
        ("He asked, \"how do you say 'tâlo' here?\"", ["tâlo"]),
        ('a 6" pipe and "tâlo,"', ["tâlo"]),
        ("nothing is quoted here, isn't it", []),
        ("\"\" and `` and ''", []),
        ("x\"tâlo\" y'mîva' \"mîva\"z 'tâlo'_", []),  # no mark beside a word quotes
        ("`say \"it's 'tâlo' here\"`, `it's`", ["tâlo", "it's"]),
    ],
)
def test_quoted_forms(text, expected):
    assert quoted_forms(text) == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        # a marked letter, and no marked letter but not English either; glosses are left out
        ('Given that "falovach" means "almost," what is "tâlo"?', 'It means "to gather".', ["falovach", "tâlo"]),
        ("How would you say 'to peel corn'?", "You would use 'yorvnach', not 'gevufach'.", ["yorvnach", "gevufach"]),
        # the same form once, in its first spelling; case and Unicode form don't matter
        ("What is `tâlo`?", f'"{unicodedata.normalize("NFD", "Tâlo")}" means "kingfisher".', ["tâlo"]),
        # multi-word forms are one form each, in or out of quotes, with the unmarked words beside the marked one
        ("What is `falo mîva`?", "The phrase falo tâlo vedach would be best.", ["falo mîva", "falo tâlo vedach"]),
        # unquoted forms
        ("Compare tâlo and mîva (to sleep).", "Liva-, lôva.", ["tâlo", "mîva", "lôva"]),
        ("What does the word falovach mean?", "It is a noun.", ["falovach"]),
        ("What does it mean, the noun \nfalovach?", "", ["falovach"]),
        ("Use word falovach; a password vedach, verb: lova", "", ["falovach"]),
        ("", "the word lova vedach, and lova again", ["lova vedach"]),
        # affixes are no lexemes; the citation form of a stem is
        ("What do the prefix \"vuẖ-\" and the suffixes '-ṯel' or `-ẖov` mark in `vuẖtâlo`?", "Person.", ["vuẖtâlo"]),
        ('The roots "vedag-" or "vedâg-" recur in "vedaga-".', "Yes.", ["vedaga"]),
        ("English 're-' is like `falova-`: a 'fal-' element.", "A `vedâ-` prefix.", ["falova"]),
        ("All of them start with `mî-`: `mîva` does.", "Yes.", ["mîva"]),
        # English in the same quotes
        ("`tâlo (to gather)` or `tâlo/mîva`?", '"we would say mîva in the evening"', ["tâlo", "mîva"]),
        ('A typing mistake: "gresn grass", "to vedach".', "Yes.", []),
        # single letters, British spelling, hyphen compounds, grammar
        ('Vowel "â" in "behaviour", "light-coloured" and "an active transitive verb"?', "No.", []),
        ("", "", []),
    ],
)
def test_extract_lexemes(question, answer, expected):
    assert extract_lexemes(question, answer) == expected


def test_the_rows_correct_the_word_list():
    # "sage" and "lone" are English to the list; "postpronominal" is not.
    rows = [
        row("What is `lone`?", 'See "lone mîva" and "sage tâlo".', row_id="1"),
        row("What is `lone mîvach`?", 'See "lone tâlo", a postpronominal verb.', row_id="2"),
        row('What is "sage" in `tâlo`?', "Sage is postpronominal; so is sage tea. The sage is a plant.", row_id="3"),
        row('What is "postpronominal"?', "A postpronominal verb.", row_id="4"),
    ]
    found = [item.lexemes for item in annotate(rows)]
    assert found == [
        ["lone", "lone mîva", "sage tâlo"],
        ["lone mîvach", "lone tâlo"],
        ["tâlo"],
        [],
    ]


def test_annotate_keeps_what_the_source_gave_and_changes_nothing_else():
    given = row('What is "mîva"?', 'It means "sleep".', lexemes=["tâlo"], row_id="1", pair=7)
    bare = row('What is "mîva"?', 'It means "sleep".', row_id="2", pair=8)
    first, second = annotate([given, bare])
    assert first is given
    assert second.lexemes == ["mîva"]
    assert second.to_dict() == {**bare.to_dict(), "lexemes": ["mîva"]}
    assert bare.lexemes == []


def test_annotate_reads_every_turn():
    chat = Row(
        id="1",
        source="test:1",
        prompt=[
            {"role": "user", "content": 'What is "mîva"?'},
            {"role": "assistant", "content": 'It means "sleep".'},
            {"role": "user", "content": 'And "gather"?'},
        ],
        completion=[{"role": "assistant", "content": '"tâlo".'}],
        lexemes=[],
        metadata={},
    )
    (annotated,) = annotate([chat])
    assert annotated.lexemes == ["mîva", "tâlo"]
    assert target_forms(annotated) == ["tâlo"]


def test_english_test_counts_rows_not_occurrences():
    test = english_test(["vedach vedach vedach are here", "nothing"])
    assert not test("vedach")
    rows = ["vedach are here", "vedach again"]
    assert english_test(rows)("vedach")
    # A form that two rows leave unquoted, but two others quote.
    assert not english_test([*rows, "it is 'vedach'", '"vedach" it is'])("vedach")


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ('Say "Tâlo".', "tâlo", True),
        ("tâloṯel", "tâlo", False),
        ("talo", "tâlo", False),
        ("tâlo", "talo", False),
        (unicodedata.normalize("NFD", "Say tâloẖov!"), "tâloẖov", True),
        ("tâlo\u0331", "tâlo", False),  # a further mark is another letter
        ("liẖ-tâlo", "tâlo", False),
        ("tâlo-", "tâlo", True),
        ("tâlo", "tâlo-", True),
        ("dada's", "dada", False),
        ("dada's", "dada\u2019s", True),
        ("'tâlo'", "tâlo", True),
        ("the tâlo  mîva", "tâlo mîva", True),
        ("tâlo, mîva", "tâlo mîva", True),
        ("mîva tâlo", "tâlo mîva", False),
        ("tâlo ne mîva", "tâlo mîva", False),
        ("123", "123", False),
        ("anything", "", False),
    ],
)
def test_contains_form(text, form, expected):
    assert contains_form(text, form) is expected


tokens_letter_by_letter = re.compile(r"-?[^\W\d_][\u0300-\u036f]*(?:['\-]?[^\W\d_][\u0300-\u036f]*)*-?")


@given(st.text(alphabet="abâṯ'-_ 1\u0331\u0301\n,", max_size=40))
def test_a_token_is_letters_with_their_marks_joined_by_single_marks(text):
    assert list(_tokens(text)) == tokens_letter_by_letter.findall(text)


words_of_text = st.lists(st.sampled_from(["tâlo", "talo", "tâloṯel", "mîva", "ne", "Ne"]), max_size=8)


@given(words_of_text, st.lists(st.sampled_from(["tâlo", "mîva", "ne"]), min_size=1, max_size=3))
def test_contains_form_is_a_search_for_whole_words(text, form):
    padded = f" {' '.join(text).casefold()} "
    assert contains_form(" ".join(text), " ".join(form)) == (f" {' '.join(form)} " in padded)


@given(st.text(), st.text())
def test_any_text_is_read(question, answer):
    for form in extract_lexemes(question, answer):
        assert len(form) > 1
        assert fold(form) == fold(form.strip("-"))


def test_target_forms():
    asked = row(
        'Is it "tâlo" or "tâlo mîva"?', '"Tâlo" is. Not vedach.', lexemes=["tâlo", "tâlo mîva", "vedach", "liva"]
    )
    assert target_forms(asked) == ["vedach"]
    assert target_forms(row("Explain `tâlo`.", "`tâlo` means gather.", lexemes=["tâlo"])) == []
    form = unicodedata.normalize("NFD", "liẖtâlo")
    planted = row('The verb "tâlo"?', '"liẖtâlo".', lexemes=["tâlo"], form=form, language="planted (invented)")
    assert target_forms(planted) == ["liẖtâlo"]
    assert target_forms(row("What is gather?", "The verb tâlo.", lexemes=["tâlo"], form="verb")) == ["tâlo"]


def test_long_hostile_text_is_read_in_linear_time():
    start = time.process_time()
    for text in ("'a " * 30_000, '"a' * 30_000, "`" * 60_000, '"vuẖ- ' * 20_000, "tâlo " * 20_000):
        extract_lexemes(text, "")
    assert time.process_time() - start < 10  # it takes less than a second


def test_annotate_in_linear_time():
    def seconds(count):
        texts = [
            f"{at} is the verb lova{'abcdefgh'[at % 8]}: " + "they gather reeds at dusk, " * 9 for at in range(count)
        ]
        rows = [row(text, f'It is "tâlo{at % (count // 4)}va" or "to gather".') for at, text in enumerate(texts)]
        start = time.process_time()
        annotate(rows)
        return time.process_time() - start

    seconds(100)
    # All-pairs work would take 16 times as long for four times the rows.
    assert min(seconds(2000) for _ in range(2)) < 10 * min(seconds(500) for _ in range(2))


def test_without_the_word_list_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['spellchecker'] = None\n"
        "from stoney_rl.errors import StoneyError\n"
        "from stoney_rl.lexemes import extract_lexemes\n"
        "try: extract_lexemes('what is \"falo\"', '')\n"
        "except StoneyError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install pyspellchecker==" in out and '"lexemes"' in out


def test_import_is_light():
    code = "import sys, stoney_rl.lexemes, stoney_rl.split; print({'torch', 'pandas', 'spellchecker'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real rows here: set STONEY_REAL_DATA")
def test_real_rows():
    rows = annotate(load_rows(REAL_DATA).rows)
    assert len(rows) == 1000
    assert sum(not item.lexemes for item in rows) <= 10
    lexemes = {fold(form) for item in rows for form in item.lexemes}
    assert 1500 < len(lexemes) < 1900
    # None of the glosses: they are made of such words.
    english = {"to", "the", "of", "someone", "something", "verb", "noun", "water", "people"}
    assert not [form for form in lexemes if english & set(form.split())]
    with_marks = {form for form in lexemes if not form.isascii()}
    assert 0.5 < len(with_marks) / len(lexemes) < 0.9
    asked = [target_forms(item) for item in rows]
    assert 350 < sum(bool(forms) for forms in asked) < 700
