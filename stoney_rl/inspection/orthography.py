"""How the language is written: its letters with counts, and what damages or imitates them.

Text that was decoded with the wrong encoding (``mojibake``, by ftfy) and characters that only look like a letter of the
language (``look_alikes``) are failures: a tokenizer, a metric and a search see another word. What reading repairs
(``RowSet.irregular``) is noted, and so are forms that differ only in diacritics, which a person has to judge.

The letters are learned from the data: those of the forms, with the number of rows each occurs in. A letter is a
look-alike if it has the shape of one that is at least ten times as frequent:

- the same shape by the confusables of UTS #39 (https://www.unicode.org/reports/tr39/, in the package
  confusable-homoglyphs), applied to the letter without its marks: another script, a font variant, ı, ɑ;
- a near shape by the marks in ``_ABOVE`` and ``_BELOW``: ĩ ī ǐ for î, ħ ḥ for ẖ.

An orthography may have two such letters and use one of them rarely (ẽ beside ê, â beside ã). A letter of the language's
own script is therefore none if it stands in words that recur and that nobody writes with the other letter; and a near
shape is one only if some of its words are also written with the other letter, or if it hardly ever occurs.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, product

from stoney_rl.data import Row, RowSet
from stoney_rl.inspection.findings import FAILURE, MAX_EXAMPLES, NOTE, Finding, Section
from stoney_rl.lexemes import is_listed_english
from stoney_rl.text import fold, normalize

# What is this rare beside the letter that it resembles is not taken for a letter: faults in a twentieth of the rows
# stay below, letters of an alphabet above.
RARE = 0.1
REGULAR_ROWS = 10  # at least, for a letter of another script to belong to the orthography
# Of near shape: what part of the rows must be about a word that is also written with the letter resembled, or else how
# rare the letter must be.
CONFIRMED, HARDLY_EVER = 0.2, 0.01
# A letter of the forms of this many rows is nothing to look into.
USUAL = 0.1
# A word in fewer rows than this may be the same slip made again.
RECURS = 3
# How much more frequent than another a spelling is, for that other to look like a slip.
SLIP = 5

_MARK = "\u0300-\u036f"
_LETTER = re.compile(f"[^\\W\\d_][{_MARK}]*")
_CLUSTER = re.compile(f"[^\\W\\d_][{_MARK}]+")
# A word as written, digits inside it too: a run of letters, digits, marks, inner hyphens and apostrophes.
_WORD = re.compile(f"[^\\W_](?:[\\w{_MARK}'\\-]*(?:[^\\W_]|[{_MARK}]))?")
_DIGIT_BESIDE_LETTER = re.compile(f"[^\\W\\d_][{_MARK}]*[01]|[01][^\\W\\d_]")

# Marks that a reader takes for one another: circumflex, tilde, macron, overline, breve, caron, inverted breve ...
_ABOVE = "\u0302\u0303\u0304\u0305\u0306\u030c\u0311"
# ... and macron, low line, minus, dot, vertical line, comma, cedilla, ogonek, tilde and breve below, and strokes.
_BELOW = "\u0331\u0332\u0320\u0323\u0329\u0326\u0327\u0328\u0330\u032e\u0335\u0336"
_NEAR = str.maketrans({**dict.fromkeys(_ABOVE, _ABOVE[0]), **dict.fromkeys(_BELOW, _BELOW[0])})
_SAME = str.maketrans("\u0332\u0320", "\u0331\u0331")  # drawn as one line below; UTS #39 has but the second
_DIGITS = {"0": "o", "1": "li"}
_LOANS = "éèêëàáäçñïöüæœ"  # in English words

# Unicode's wide, narrow and font variants and its ligatures; not superscripts, which some orthographies use.
_VARIANTS = ("<wide>", "<narrow>", "<font>", "<compat>")

_USUAL = "“”„«»–—…•·°\u00a0"  # not letters, and usual in prose
# How the UTF-8 of most accented Latin letters, of those with a line or dot below, and of curly quotes begins, misread.
_TELLTALE = "[ÃÂÄÅ]|á[¸¹º]|â€"
_C1 = frozenset(f"invisible U+{code:04X}" for code in range(0x80, 0xA0) if code != 0x85)  # U+0085 may end a line


@dataclass
class _Usage:
    """What one pass over the rows counts. A letter is lower case, NFC, with its combining marks.

    words: word -> rows with it. forms: folded form -> rows with it. spelling: folded form -> lower case.
    own: words of forms. rows_of: letter -> rows with a form that holds it. characters: code point -> occurrences in
    the texts. prose: letter -> occurrences outside the row's forms.
    """

    words: Counter = field(default_factory=Counter)
    forms: Counter = field(default_factory=Counter)
    spelling: dict[str, str] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    rows_of: Counter = field(default_factory=Counter)
    characters: Counter = field(default_factory=Counter)
    prose: Counter = field(default_factory=Counter)

    def leave_out(self, rows: Sequence[Row]) -> None:
        """Take back what ``rows`` added to the counts of rows; ``own`` and ``spelling`` keep what is not counted."""
        other = _read(rows)
        self.words = self.words - other.words
        self.forms = self.forms - other.forms
        self.rows_of = self.rows_of - other.rows_of


def _text(row: Row) -> str:
    return "\n".join([turn["content"] for turn in (*row.prompt, *row.completion)])


def _lower(text: str) -> str:
    """Lower case in NFC, letter for letter: case folding would take ``ß`` and ligatures apart."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", text.replace("İ", "i").lower())


def _count_characters(text: str) -> Counter:
    """Occurrences of each code point of ``text``."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    counts = np.bincount(codes)
    return Counter({chr(code): int(counts[code]) for code in np.flatnonzero(counts).tolist()})


def _count_letters(text: str) -> Counter:
    """Occurrences of each letter of ``text`` (lower case, NFC), a letter being one with its combining marks."""
    counts = _count_characters(text)
    letters = Counter({char: count for char, count in counts.items() if char.isalpha()})
    if any("\u0300" <= char <= "\u036f" for char in counts):
        for cluster, count in Counter(_CLUSTER.findall(text)).items():
            letters[cluster] += count
            letters[cluster[0]] -= count
    return +letters


def _read(rows: Sequence[Row]) -> _Usage:
    usage = _Usage()
    known: dict[str, tuple[str, frozenset[str], frozenset[str]]] = {}  # lexeme -> folded, its words, its letters
    texts: list[str] = []
    prose: list[str] = []
    held = 0

    def flush() -> None:
        nonlocal held
        usage.characters.update(_count_characters("".join(texts)))
        usage.prose.update(_count_letters("\n".join(prose)))
        texts.clear()
        prose.clear()
        held = 0

    for row in rows:
        text = _text(row)
        forms, own, letters = set(), set(), set()
        for lexeme in row.lexemes:
            if lexeme not in known:
                lower = _lower(lexeme)
                known[lexeme] = fold(lexeme), frozenset(_WORD.findall(lower)), frozenset(_LETTER.findall(lower))
                usage.spelling.setdefault(known[lexeme][0], lower)
            form, words, more = known[lexeme]
            forms.add(form)
            own |= words
            letters |= more
        tokens = _WORD.findall(_lower(text))
        usage.words.update(set(tokens))
        usage.forms.update(forms)
        usage.rows_of.update(letters)
        usage.own |= own
        texts.append(text)
        prose += [token for token in tokens if token not in own]
        held += len(text)
        if held > 1 << 21:
            flush()
    flush()
    return usage


def _code_points(letter: str) -> str:
    return " ".join(f"U+{ord(char):04X}" for char in letter)


def _name(letter: str) -> str:
    return " + ".join(unicodedata.name(char, "unnamed") for char in letter)


def _letters(usage: _Usage) -> list[dict]:
    spellings = usage.spelling.values()
    in_forms = _count_letters("\n".join(spellings))
    initials = Counter(found[0] for found in map(_LETTER.search, spellings) if found)
    everything = sorted(in_forms | usage.prose, key=lambda letter: (-in_forms[letter], -usage.prose[letter], letter))
    return [
        {
            "letter": letter,
            "code_points": _code_points(letter),
            "name": _name(letter),
            "in_forms": in_forms[letter],
            "form_initial": initials[letter],
            "in_prose": usage.prose[letter],
            "rows": usage.rows_of[letter],
        }
        for letter in everything
    ]


def _bytes_per_letter(letters: Iterable[dict], key: str) -> float | None:
    counted = [(len(item["letter"].encode("utf-8", "surrogatepass")), item[key]) for item in letters]
    total = sum(count for _, count in counted)
    return round(sum(size * count for size, count in counted) / total, 4) if total else None


# Look-alikes


@cache
def _prototype(char: str) -> str:
    """What UTS #39 takes ``char`` to look like: the character that it and its look-alikes share, or itself."""
    from confusable_homoglyphs.confusables import confusables_data

    # The data link each character with its prototype, both ways: whoever has several links is the prototype.
    links = confusables_data.get(char, [])
    if len(links) == 1:
        other = links[0]["c"]
        char = min(char, other) if len(confusables_data.get(other, [])) == 1 else other
    # Cyrillic к т м н look like small capitals there, which nobody tells from the letters in a word.
    capital = re.fullmatch("LATIN LETTER SMALL CAPITAL ([A-Z])", unicodedata.name(char, "")) if len(char) == 1 else None
    return "k" if char == "ĸ" else capital[1].lower() if capital else char


@cache
def _shapes(letter: str) -> tuple[str, str]:
    """(shape, near shape) of a letter as NFD text: letters of one shape can't be told apart, of a near one hardly."""
    variant = unicodedata.decomposition(letter).split(" ")[0] if len(letter) == 1 else ""
    text = unicodedata.normalize("NFKD" if variant in _VARIANTS else "NFD", letter)
    # A mark is not replaced by UTS #39's prototype, which may be no combining mark (U+0304 is linked with Arabic).
    same = "".join(char if unicodedata.combining(char) else _prototype(char).lower() for char in text)
    same = unicodedata.normalize("NFD", same.translate(_SAME))
    return same, same.translate(_NEAR)


@dataclass(frozen=True)
class _LookAlike:
    """``letter`` may only look like ``resembles``: a letter, or several for a ligature; a digit has two readings.

    own: whether it could be a letter of the language: one of the same script. marks: if only its shape is near, the
    marks of the two.
    """

    letter: str
    resembles: tuple[str, ...]
    own: bool = False
    marks: tuple[str, str] | None = None

    def describe(self) -> str:
        return f"{self.letter} ({_code_points(self.letter)}, {_name(self.letter)}) for {' or '.join(self.resembles)}"


def _suspects(usage: _Usage) -> Iterator[_LookAlike]:
    """The letters outside ASCII that have the shape of a letter in more rows of forms."""
    by_shape: dict[str, str] = {}
    by_near: dict[str, str] = {}
    for letter, _ in sorted(usage.rows_of.items(), key=lambda item: (-item[1], item[0])):
        same, near = _shapes(letter)
        by_shape.setdefault(same, letter)
        by_near.setdefault(near, letter)
    for letter in sorted({found for word in usage.words if not word.isascii() for found in _LETTER.findall(word)}):
        if letter.isascii():
            continue
        same, near = _shapes(letter)
        parts = _LETTER.findall(unicodedata.normalize("NFC", same))
        if by_shape.get(same, letter) != letter:
            resembled = by_shape[same]
            bare = _strip_marks(letter) != _strip_marks(resembled)
            yield _LookAlike(letter, (resembled,), own=bare and _script(letter) == _script(resembled))
        elif len(parts) > 1 and unicodedata.decomposition(letter).startswith(_VARIANTS):
            if all(part in usage.rows_of for part in parts):
                yield _LookAlike(letter, ("".join(parts),))
        elif by_near.get(near, letter) != letter:
            resembled = by_near[near]
            marks = tuple("".join(filter(unicodedata.combining, _shapes(text)[0])) for text in (letter, resembled))
            yield _LookAlike(letter, (resembled,), _script(letter) == _script(resembled), marks)


def _rows_with(usage: _Usage, resembled: str) -> int:
    return min(usage.rows_of[letter] for letter in _LETTER.findall(resembled))


def _is_attested(usage: _Usage, word: str, repaired: str) -> bool:
    return repaired in usage.own and usage.words[repaired] >= usage.words[word]


def _repair(usage: _Usage, word: str, suspects: Mapping[str, _LookAlike]) -> str:
    """``word`` with what each suspect resembles; of several readings, the first that is attested."""
    choices = [
        suspects[piece].resembles if piece in suspects else (piece,)
        for piece in re.findall(f"[^\\W_][{_MARK}]*|.", word)
    ]
    readings = ["".join(reading) for reading in islice(product(*choices), 32)]
    return next((reading for reading in readings if _is_attested(usage, word, reading)), readings[0])


def _script(letter: str) -> str:
    return unicodedata.name(letter[0], "").split(" ")[0]


def _look_alikes(usage: _Usage) -> tuple[dict[str, tuple[str, list[_LookAlike]]], list[dict]]:
    """Words of the language that hold look-alikes: word -> (the word as it should be, its look-alikes); the figures."""
    suspects = {suspect.letter: suspect for suspect in _suspects(usage)}
    scripts = Counter()
    for letter, count in usage.rows_of.items():
        scripts[_script(letter)] += count
    script = max(sorted(scripts), key=scripts.__getitem__, default="LATIN")

    words_of: dict[str, dict[str, str]] = {}  # suspect -> {word: repaired}
    held = re.compile("|".join(map(re.escape, sorted(suspects, key=len, reverse=True)))) if suspects else None
    for word in usage.words:
        if held is None or word.isascii() or not held.search(word):
            continue
        letters = _LETTER.findall(word)
        found = {letter for letter in letters if letter in suspects}
        repaired = _repair(usage, word, suspects)
        attested = _is_attested(usage, word, repaired)
        # A word of another language in its own script is neither.
        if any(_script(letter) != script for letter in _LETTER.findall(repaired)):
            continue
        if not attested and all(letter in suspects and not suspects[letter].own for letter in letters):
            continue
        if repaired not in usage.own and _is_english(word, repaired):
            continue
        for letter in found:
            words_of.setdefault(letter, {})[word] = repaired

    for digit, resembled in _DIGITS.items():
        likely = tuple(letter for letter in resembled if usage.rows_of[letter])
        if likely:
            suspects[digit] = _LookAlike(digit, likely)
    for word in usage.words:
        if ("0" in word or "1" in word) and _DIGIT_BESIDE_LETTER.search(word):
            repaired = _repair(usage, word, suspects)
            if _is_misread_digit(usage, word, repaired):
                for digit in {"0", "1"} & set(word) & suspects.keys():
                    words_of.setdefault(digit, {})[word] = repaired

    rare: dict[str, float] = {}  # suspect -> its rows relative to those of what it resembles
    confirmed: Counter = Counter()  # marks of near shapes -> rows about a word that is also written with the other
    in_all: Counter = Counter()
    for letter, found in sorted(words_of.items()):
        suspect = suspects[letter]
        count = sum(usage.words[word] for word in found)
        share = count / max(_rows_with(usage, resembled) for resembled in suspect.resembles)
        # In few rows a letter of another script is a slip, whatever its share of so little.
        regular = share > RARE and (_script(letter) == script or count >= REGULAR_ROWS)
        if regular or (suspect.own and 2 * _in_regular_use(usage, found) >= count):
            continue
        rare[letter] = share
        in_all[suspect.marks] += count
        confirmed[suspect.marks] += sum(usage.words[w] for w, fixed in found.items() if _is_attested(usage, w, fixed))

    flagged: dict[str, tuple[str, list[_LookAlike]]] = {}
    figures = []
    for letter, share in rare.items():
        suspect, found = suspects[letter], words_of[letter]
        proven = suspect.marks is None or confirmed[suspect.marks] >= CONFIRMED * in_all[suspect.marks]
        if not proven and share > HARDLY_EVER:
            continue
        for word, repaired in found.items():
            flagged.setdefault(word, (repaired, []))[1].append(suspect)
        figures.append(
            {
                "letter": letter,
                "code_points": _code_points(letter),
                "name": _name(letter),
                "resembles": list(suspect.resembles),
                "words": len(found),
            }
        )
    return flagged, figures


def _is_english(word: str, repaired: str) -> bool:
    if is_listed_english(repaired):
        return True
    if set(word).isdisjoint(_LOANS):
        return False
    return is_listed_english(_strip_marks(word))


def _in_regular_use(usage: _Usage, found: Mapping[str, str]) -> int:
    """The rows of those words that recur and are not written with the letter resembled."""
    return sum(
        usage.words[word]
        for word, repaired in found.items()
        if usage.words[word] >= RECURS and not _is_attested(usage, word, repaired)
    )


def _is_misread_digit(usage: _Usage, word: str, repaired: str) -> bool:
    """Whether the 0 or 1 in ``word`` (not 1st, x1 or a numbered sense such as tâlo1) stands for a letter."""
    if _is_attested(usage, word, repaired):
        return True
    if not repaired.replace("-", "").replace("'", "").isalpha() and not _CLUSTER.search(repaired):
        return False  # other digits are left: a date, a code
    if all(char.isascii() or char in _LOANS for char in word) or is_listed_english(repaired):
        return False
    bare = word.rstrip("01")
    numbered = bare != word and (usage.words[bare] or any(usage.words[f"{bare}{digit}"] for digit in "23"))
    return not numbered


def _in_quotes(text: str, start: int) -> bool:
    return start > 0 and text[start - 1] in "\"'`“"


def _look_alike_finding(
    rows: Sequence[Row], usage: _Usage, flagged: Mapping[str, tuple[str, list[_LookAlike]]], damaged: set[str]
) -> Finding | None:
    """The rows with words of ``flagged``, without the ``damaged`` ones."""
    if not flagged:
        return None
    letters = {suspect.letter for _, suspects in flagged.values() for suspect in suspects}
    anything = re.compile("|".join(map(re.escape, sorted(letters, key=len, reverse=True))))
    row_ids, details, examples = [], [], []
    for row in rows:
        text = _text(row)
        if row.id in damaged or not anything.search(_lower(text)):
            continue
        found: dict[str, str] = {}
        for match in _WORD.finditer(text):
            word = _lower(match[0])
            if word not in flagged or word in found:
                continue
            repaired, suspects = flagged[word]
            # Māori in an English sentence: a name, unless the data have the word with the letter resembled.
            name = match[0][0].isupper() and not _in_quotes(text, match.start()) and not usage.words[repaired]
            if name and all(suspect.marks for suspect in suspects):
                continue
            shown = ", ".join(suspect.describe() for suspect in suspects)
            found[word] = f'{shown} in "{match[0]}"'
            if len(examples) < MAX_EXAMPLES and len(found) == 1:
                examples.append({"row": row.id, "word": match[0], "look_alike": shown, "read_as": repaired})
        if found:
            row_ids.append(row.id)
            details.append("; ".join(found.values()))
    if not row_ids:
        return None
    return Finding(
        "look_alikes",
        FAILURE,
        len(row_ids),
        len(rows),
        "rows",
        f"{len(row_ids):,} rows write a form with a character that only looks like one of its letters: to a tokenizer "
        "and a metric it is another word; replace the character, or allow it if it is a letter of the language",
        tuple(row_ids),
        tuple(details),
        tuple(examples),
    )


# Mojibake


def _misread(letters: Sequence[str]) -> dict[str, str]:
    """How reading shows a letter whose UTF-8 was decoded as Latin-1 or Windows-1252 -> the letter.

    Normalising has removed control characters and turned ´ into an apostrophe, so that ftfy can't restore ẖ and ô. Where
    two letters are shown alike, the first counts. ``letters`` are lower case; their capitals come behind.
    """
    import ftfy.bad_codecs

    ftfy.bad_codecs.ok()  # registers sloppy-windows-1252, which decodes every byte
    shown: dict[str, str] = {}
    for letter in (*letters, *map(str.upper, letters)):
        for encoding in ("sloppy-windows-1252", "latin-1"):
            wrong = normalize(f"x{letter.encode().decode(encoding)}x")[1:-1]
            if len(wrong) > 1 and not wrong.isascii():
                shown.setdefault(wrong, letter)
    return shown


def _misread_pattern(shown: Iterable[str]) -> re.Pattern:
    """Finds what ``_misread`` lists; what ends in an apostrophe only inside a word, not in a quoted 'IRMÃ'."""
    longest_first = sorted(shown, key=lambda wrong: (-len(wrong), wrong))
    return re.compile(
        "|".join(
            f"(?<=[a-z]){re.escape(wrong)}(?=[^\\W\\d_])" if wrong.endswith("'") else re.escape(wrong)
            for wrong in longest_first
        )
    )


def _mojibake(rows: Sequence[Row], rowset: RowSet, usage: _Usage) -> Finding | None:
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    usual = {letter for letter, count in usage.rows_of.items() if count > USUAL * len(rows)}
    usual |= {letter.upper() for letter in usual} | set(_USUAL)
    odd = "".join(sorted(char for char in usage.characters if not char.isascii() and char not in usual))
    guard = re.compile(f"{_TELLTALE}|[{re.escape(odd)}]" if odd else _TELLTALE)
    by_rows = sorted(usage.rows_of, key=lambda letter: (-usage.rows_of[letter], letter))
    shown = _misread([letter for letter in (*by_rows, *_LOANS, *"‘’“”–—…") if len(letter) == 1])
    pattern = _misread_pattern(shown)

    # “Î” and «TÂ» are quoted letters of the language, not the bytes of another one.
    capitals = "".join(sorted({letter.upper()[0] for letter in usage.rows_of if not letter.isascii()}))
    after_capital = re.compile(f"(?<=[{capitals}])[{_USUAL}](?!\\w)") if capitals else re.compile("(?!)")

    def pieces(text: str) -> Iterator[tuple[str, str]]:
        """(damaged word, the word as it should be) of a text that ftfy or the table finds damaged."""
        for token in re.split("[ \\t\\n]+", text):
            if token.isascii():
                continue
            fixed = fix_encoding(token) if is_bad(token) else token
            fixed = pattern.sub(lambda match: shown[match[0]], fixed)
            if fixed != token:
                yield token, fixed

    row_ids, details, examples = [], [], []
    for row in rows:
        text = _text(row)
        found: dict[str, str] = {}
        if guard.search(text):
            text = after_capital.sub('"', text)
            if is_bad(text) or pattern.search(text):
                found = dict(pieces(text))
        stray = sorted(_C1.intersection(rowset.irregular.get(row.id, ())))
        if not found and not stray:
            continue
        row_ids.append(row.id)
        if found:
            details.append("; ".join(f"{damaged} is {fixed}" for damaged, fixed in found.items()))
        else:
            codes = ", ".join(kind.split(" ")[1] for kind in stray)
            details.append(f"held the control characters {codes}: bytes of another encoding read as Latin-1")
        if len(examples) < MAX_EXAMPLES:
            damaged, fixed = next(iter(found.items()), (text[:60], ""))
            examples.append({"row": row.id, "text": damaged[:60], "should_be": fixed[:60]})
    if not row_ids:
        return None
    return Finding(
        "mojibake",
        FAILURE,
        len(row_ids),
        len(rows),
        "rows",
        f"{len(row_ids):,} rows were decoded with the wrong encoding (UTF-8 read as Latin-1 or Windows-1252), so their "
        "letters are lost to whoever reads them; export them from the source again, as UTF-8",
        tuple(row_ids),
        tuple(details),
        tuple(examples),
    )


# Diacritics


@cache
def _strip_marks(text: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn")


def _diacritic_groups(forms: Mapping[str, int], glosses: Mapping[str, str]) -> list[dict]:
    """Forms that are one form without their diacritics, most rows first."""
    groups: dict[str, list[str]] = {}
    for form in forms:
        groups.setdefault(_strip_marks(form), []).append(form)
    found = []
    for plain, members in groups.items():
        if len(members) < 2:
            continue
        members.sort(key=lambda form: (-forms[form], form))
        stated = {glosses[form] for form in members if form in glosses}
        if len(stated) > 1:
            reading = "possible minimal pair"
        elif forms[members[0]] >= SLIP * forms[members[-1]]:
            reading = "possible misspelling"
        else:
            reading = "open"
        found.append(
            {
                "without_diacritics": plain,
                "rows": sum(forms[form] for form in members),
                "reading": reading,
                "forms": [{"form": form, "rows": forms[form], "gloss": glosses.get(form)} for form in members],
            }
        )
    return sorted(found, key=lambda group: (-group["rows"], group["without_diacritics"]))


def _diacritic_finding(groups: Sequence[dict], total: int) -> Finding | None:
    if not groups:
        return None
    count = sum(len(group["forms"]) for group in groups)
    slips = sum(group["reading"] == "possible misspelling" for group in groups)
    examples = [
        {
            "without_diacritics": group["without_diacritics"],
            "forms": ", ".join(f"{item['form']} ({item['rows']})" for item in group["forms"]),
            "reading": group["reading"],
        }
        for group in groups[:MAX_EXAMPLES]
    ]
    return Finding(
        "diacritic_pairs",
        NOTE,
        count,
        total,
        "forms",
        f"{count:,} forms in {len(groups):,} groups differ only in their diacritics, in {slips:,} of the groups one is "
        "much rarer: minimal pairs or misspellings, which somebody who knows the language can tell",
        examples=tuple(examples),
    )


# What reading repairs


def _repaired_finding(
    rows: Sequence[Row], rowset: RowSet, kind: str, prefix: str, message: str, describe=None
) -> Finding | None:
    row_ids, details, examples = [], [], []
    for row in rows:
        found = [name for name in rowset.irregular.get(row.id, ()) if name.startswith(prefix)]
        if not found:
            continue
        detail = ", ".join(name.removeprefix(prefix).strip() for name in found)
        if describe:
            detail = "; ".join(filter(None, (detail, describe(row))))
        row_ids.append(row.id)
        details.append(detail)
        if len(examples) < MAX_EXAMPLES:
            examples.append({"row": row.id, "found": detail or kind, "text": _text(row)[:80]})
    if not row_ids:
        return None
    return Finding(
        kind,
        NOTE,
        len(row_ids),
        len(rows),
        "rows",
        f"{len(row_ids):,} rows {message}",
        tuple(row_ids),
        tuple(details),
        tuple(examples),
    )


def _with_apostrophe(row: Row) -> str:
    forms = [form for form in row.lexemes if "'" in form]
    return f"the row's forms with an apostrophe: {', '.join(forms)}" if forms else "in English only"


def _repaired(rows: Sequence[Row], rowset: RowSet, irregular: Mapping[str, int]) -> Iterator[Finding | None]:
    yield _repaired_finding(
        rows,
        rowset,
        "not_nfc",
        "not NFC",
        "are not in NFC: repaired here, but other tools that read the source see two spellings of one word; write the "
        "source in NFC",
    )
    yield _repaired_finding(
        rows,
        rowset,
        "invisible_characters",
        "invisible ",
        "hold characters that nobody sees (zero-width, soft hyphen, controls): removed here, but other tools that read "
        "the source see other words; remove them there",
    )
    variants = [kind for kind in irregular if kind.startswith("apostrophe ")]
    counts = ", ".join(f"{kind.split(' ')[1]} in {irregular[kind]:,}" for kind in variants)
    in_forms = sum(
        any("'" in form for form in row.lexemes)
        for row in rows
        if any(kind.startswith("apostrophe ") for kind in rowset.irregular.get(row.id, ()))
    )
    yield _repaired_finding(
        rows,
        rowset,
        "apostrophe_variants",
        "apostrophe ",
        f"hold other marks than U+0027 for the apostrophe ({counts}): usual in English prose and made one here; "
        f"{in_forms:,} of the rows have a form with an apostrophe, which other tools may see in several spellings",
        _with_apostrophe,
    )


def find(rowset: RowSet, rows: Sequence[Row], *, glosses: Mapping[str, str] | None = None) -> Section:
    """The section ``orthography``. ``rows`` are rows of ``rowset`` with their lexemes (``lexemes.annotate``).

    glosses: folded form -> gloss, where known; forms that differ in diacritics and gloss are no misspellings.

    figures: ``letters``, most frequent in forms first (in_forms: occurrences in distinct forms; form_initial: distinct
    forms that begin with it; in_prose: occurrences in texts outside the row's forms; rows: rows with a form that holds
    it); ``utf8_bytes_per_letter`` in forms and in prose; ``irregular``: rows by kind of ``text.irregularities``;
    ``look_alikes``: the characters taken for such; ``diacritic_groups``: all of them.
    """
    usage = _read(rows)
    letters = _letters(usage)
    irregular = Counter(kind for row in rows for kind in rowset.irregular.get(row.id, ()))
    irregular = {kind: irregular[kind] for kind in sorted(irregular)}

    mojibake = _mojibake(rows, rowset, usage)
    damaged = set(mojibake.row_ids) if mojibake else set()
    if damaged:  # what their letters look like means nothing
        usage.leave_out([row for row in rows if row.id in damaged])
    flagged, figures = _look_alikes(usage)
    look_alikes = _look_alike_finding(rows, usage, flagged, damaged)
    forms = {
        form: count
        for form, count in usage.forms.items()
        if not flagged or flagged.keys().isdisjoint(_WORD.findall(usage.spelling[form]))
    }
    groups = _diacritic_groups(forms, glosses or {})

    found = [mojibake, look_alikes, *_repaired(rows, rowset, irregular), _diacritic_finding(groups, len(forms))]
    return Section(
        "orthography",
        {
            "letters": letters,
            "utf8_bytes_per_letter": {key: _bytes_per_letter(letters, key) for key in ("in_forms", "in_prose")},
            "irregular": irregular,
            "look_alikes": figures,
            "diacritic_groups": groups,
        },
        [finding for finding in found if finding],
    )
