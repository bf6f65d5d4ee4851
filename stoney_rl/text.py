"""The one normaliser: training, evaluation, rewards and interpretation all compare text in this form."""

import re
import unicodedata

# Marks that stand for the apostrophe in typed text. The backtick is not one of them: datasets quote words with it.
APOSTROPHES = "\u2018\u2019\u201b\u02bc\u02bb\u02b9\u2032\u00b4\uff07"
_APOSTROPHE = re.compile(f"[{APOSTROPHES}]")
# C0 and C1 controls except tab and newline; zero-width space, BOM, soft hyphen, and the bidirectional controls.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")

# A word is letters with their combining marks, joined inside by apostrophes or hyphens: nâzude, dada's, e-echuch.
_WORD = re.compile(r"[^\W\d_]+[\u0300-\u036f]*(?:['\-]?[^\W\d_]+[\u0300-\u036f]*)*")


def normalize(text: str) -> str:
    """Return ``text`` in NFC with one apostrophe (U+0027), ``\\n`` line ends and no invisible controls.

    Nothing is folded to ASCII and case is kept: in this orthography a diacritic is a different letter.
    NFC is Unicode's canonical composition (UAX #15); ẖ and ṯ have composed code points, so NFC is lossless here.
    """
    if not text.isprintable():  # as no line end and no control is
        text = _INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if not text.isascii():
        # NFC comes before the apostrophes: it turns U+0374 and U+1FFD into two of them.
        text = _APOSTROPHE.sub("'", unicodedata.normalize("NFC", text))
    return text.strip()


def irregularities(text: str) -> set[str]:
    """The kinds of what ``normalize`` repairs in ``text``, space at its edges aside: empty for regular text.

    ``"not NFC"``; ``"apostrophe U+2019"`` and ``"invisible U+200B"``, one for each code point found; ``"line end"`` for
    ``\\r``, whether or not ``\\n`` follows.
    """
    text = text.strip()
    if normalize(text) == text:
        return set()
    kinds = {f"invisible U+{ord(char):04X}" for char in _INVISIBLE.findall(text)}
    kinds |= {f"apostrophe U+{ord(char):04X}" for char in _APOSTROPHE.findall(text)}
    if "\r" in text:
        kinds.add("line end")
    if not unicodedata.is_normalized("NFC", text):
        kinds.add("not NFC")
    return kinds


def words(text: str) -> list[str]:
    """The words of ``text``, normalised, in order, case kept: letters joined by inner apostrophes and hyphens."""
    return _WORD.findall(normalize(text))


def fold(form: str) -> str:
    """The key under which two spellings count as the same form: normalised, case-folded, one space between words."""
    return " ".join(unicodedata.normalize("NFC", normalize(form).casefold()).split())
