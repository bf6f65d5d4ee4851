"""The one normaliser. Code points are spelled out, so that no editor can make a test pass."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoney_rl.text import APOSTROPHES, fold, normalize, words

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
