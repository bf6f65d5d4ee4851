"""The one normaliser. Code points are spelled out, so that no editor can make a test pass."""

import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoney_rl.text import APOSTROPHES, fold, irregularities, normalize, words

# The letters of the orthography that ASCII folding would destroy, composed: â î û ḵ ẖ ṯ ĝ ǧ.
LETTERS = "\u00e2\u00ee\u00fb\u1e35\u1e96\u1e6f\u011d\u01e7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\u0302", "\u00e2"),  # a + circumflex -> â
        ("h\u0331", "\u1e96"),  # h + macron below -> ẖ
        ("t\u0331", "\u1e6f"),
        ("\u00e2", "\u00e2"),
        ("dada\u2019s", "dada's"),
        ("dada\u02bcs", "dada's"),
        ("`ba`", "`ba`"),  # a backtick quotes, it is no apostrophe
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ufeffa\u200bb\u00ad", "ab"),
        ("a\tb", "a\tb"),
        ("  a  ", "a"),
        ("\x00a\x1b", "a"),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


def test_every_letter_and_its_case_survive():
    assert normalize(unicodedata.normalize("NFD", LETTERS)) == LETTERS
    assert normalize(LETTERS.upper()) == unicodedata.normalize("NFC", LETTERS.upper())
    assert len(set(normalize(LETTERS + "aiukhtgg"))) == len(LETTERS) + 7  # no letter became its ASCII neighbour


@pytest.mark.parametrize("mark", APOSTROPHES)
def test_each_apostrophe_becomes_one(mark):
    assert normalize(f"a{mark}b") == "a'b"


@given(st.text())
def test_normalize_is_idempotent_and_nfc(text):
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", set()),
        ('  It\'s "t\u00e2lo",\n\tand `lu\u1e96e`. \n', set()),
        ("q\u0331a", set()),  # NFC has no composed letter for it
        ("t\u00e2lo ta\u0302lo", {"not NFC"}),
        ("it\u2019s \u2018ba\u2019", {"apostrophe U+2018", "apostrophe U+2019"}),
        ("it\u1ffds", {"not NFC"}),  # U+00B4, twice removed
        ("b\u200ba\u00ad\u200b", {"invisible U+200B", "invisible U+00AD"}),
        ("\ufeffba", {"invisible U+FEFF"}),
        ("a\r\nb", {"line end"}),
        ("a\rb\x1b", {"line end", "invisible U+001B"}),
    ],
)
def test_irregularities(text, kinds):
    assert irregularities(text) == kinds


@given(st.text())
def test_text_is_regular_if_normalising_only_strips_it(text):
    assert not irregularities(normalize(text))
    assert bool(irregularities(text)) == (normalize(text) != text.strip())


def test_normalize_does_its_steps_for_every_code_point():
    # normalize leaves out the steps that can change nothing; here none is left out.
    invisible = {*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x200E, 0x200F, 0xFEFF}
    invisible |= {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    for code in range(sys.maxunicode + 1):
        text = f"a{chr(code)}b" if code not in invisible else "ab"
        text = unicodedata.normalize("NFC", "a\nb" if code == 0x0D else text)
        expected = "".join("'" if char in APOSTROPHES else char for char in text)
        assert normalize(f"a{chr(code)}b") == expected, hex(code)


words_letter_by_letter = re.compile(r"[^\W\d_][\u0300-\u036f]*(?:['\-]?[^\W\d_][\u0300-\u036f]*)*")


@given(st.text(alphabet="abÂ\u1e6f'-_ 1\u0331\u0301\u2019\n,ß", max_size=40))
def test_words_are_letters_with_their_marks_joined_by_single_marks(text):
    assert words(text) == words_letter_by_letter.findall(normalize(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("N\u00e2zude, ba!", ["N\u00e2zude", "ba"]),
        ("dada's e-echuch", ["dada's", "e-echuch"]),
        ('"ba" (wa) 12 x2', ["ba", "wa", "x"]),
        ("-ba- 'wa'", ["ba", "wa"]),
        ("h\u0331a", ["\u1e96a"]),
        ("q\u0331a", ["q\u0331a"]),  # no composed code point: the mark stays with its letter
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_fold_joins_spellings_of_one_form_and_keeps_different_letters_apart():
    assert fold(" N\u00c2ZUDE  wa ") == fold("na\u0302zude wa") == "n\u00e2zude wa"
    assert fold("\u00e2") != fold("a")
    assert fold("\u1e96") != fold("h")


@given(st.text())
def test_fold_is_idempotent(text):
    assert fold(fold(text)) == fold(text)
