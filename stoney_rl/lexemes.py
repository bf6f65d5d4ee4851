"""The forms of the language that a row is about, told apart from the English that explains them.

A row is English prose that quotes both: ``"tâlo" means "gather"`` (an invented word, as are all in these comments).
A quoted span counts as a form when

1. it has a marked letter (â î û ô ṯ ẖ ...); of a span that is mostly English, only the marked words and their
   non-English neighbours; or
2. its one word is not English; or
3. it is a phrase with no function word (*to*, *of*, *someone* ...) and no English word of five letters or more, and
   at most half of its words are English: two languages share many short spellings.

What is English: the ``pyspellchecker`` word list, corrected by the rows themselves (``english_test``): the list knows
too many rare words and names that are also forms, and too few technical terms. A word with a marked letter is a form
without quotes too, together with the non-English words beside it. Affixes (``-ṯel``, ``the prefix "vuẖ-"``) are not
lexemes; the hyphen that ends the citation form of a verb stem is dropped.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError
from stoney_rl.text import fold, normalize, words

if TYPE_CHECKING:
    from stoney_rl.data import Row

MAX_FORM_WORDS = 20  # a dictionary's sentences are shorter

IsEnglish = Callable[[str], bool]

# Letters that English borrows; any other letter outside ASCII belongs to the language.
_LOAN_LETTERS = "éèêëàáäçñïöüæœ"
_MARKED = re.compile(rf"(?![{_LOAN_LETTERS}{_LOAN_LETTERS.upper()}])[^\W\d_\x00-\x7f]|[A-Za-z][\u0300-\u036f]")

# `...`  "..."  “...”  '...': a mark opens after a non-word character and closes before one, so that an apostrophe or
# an inch mark opens nothing.
_QUOTED = re.compile(
    r"`([^`\n]+)`"
    r'|"(?<!\w")(?=\S)([^"\n]+)"(?!\w)'  # the mark first: a pattern that starts with a letter is found faster
    r"|“([^”\n]+)”"
    r"|'(?<!\w')(?=[^\s'])([^\n\"`]{0,200}?\S)'(?!\w)"
)
_MARK = re.compile("[`\"“']")
_TOKEN = re.compile(r"-?[^\W\d_]+[\u0300-\u036f]*(?:['\-]?[^\W\d_]+[\u0300-\u036f]*)*-?")
_PART = re.compile(r"[^/()\[\]+]+")
_BETWEEN_PARTS = re.compile(r"[/()\[\]+]")
_EDGES = " \t.,;:!?…*_~<>\"'`“”"

# Words that make an unmarked phrase English.
_FUNCTION_WORDS = frozenset(
    """
    a an the this that these those to of in on at for from with without by as into about over under and or nor but not
    no vs is are was were be been being am do does did don't has have had will would can could should may might must i
    i'm you your it it's its his her hers our their them they we us my mine she him who what when where which how why
    there here one one's someone something someone's somebody oneself another other very more most than then so if all
    always never
    """.split()  # noqa: SIM905
)
_NAMES = frozenset({"stoney", "nakoda", "nakota", "lakota", "dakota", "siouan", "kananaskis"})

# Words that call the hyphenated form beside them a piece of a word.
_PIECE = r"(?:prefix|suffix|infix|affix|root|element|component|sequence|morpheme|marker|ending|preverb)(?:es)?s?"
_PIECE_BEFORE = re.compile(
    rf"\b(?:{_PIECE}|starts?|begins?)(?: (?:of|like|such as|with))?[\s:,(`\"'“*]*$", re.IGNORECASE
)
_PIECE_AFTER = re.compile(rf"^[\s`\"'”*)]*(?:initial |common |shared )?(?:{_PIECE}|initial|stem|part)\b", re.IGNORECASE)
_ANNOUNCING = "(?:word|term|phrase|verb|noun|adverb|adjective|use|say) "
_ANNOUNCED = re.compile(rf"\b{_ANNOUNCING}$")
_MAY_BE_ANNOUNCED = re.compile(rf"{_ANNOUNCING}\n?(?=({_TOKEN.pattern}))")
_LIST_GLUE = re.compile(r"^[\s`\"'“”*]*(?:or|and|,|/)?[\s`\"'“”*]*$")

# English prefixes that answers compare the language's own with.
_ENGLISH_PIECES = frozenset(
    """re- un- in- im- inter- pre- non- dis- mis- over- under- out- anti- sub- co- de- ex-""".split()  # noqa: SIM905
)


_folded = cache(fold)  # for tokens and forms, which come again and again


@cache
def _word_list() -> frozenset[str]:
    try:
        from spellchecker import SpellChecker
    except ImportError:
        raise StoneyError(
            "finding the lexemes of a row needs an English word list: pip install pyspellchecker==0.9.1, "
            'or give each row its own "lexemes"'
        ) from None
    return frozenset(SpellChecker(language="en", distance=1).word_frequency.dictionary)


def _listed(word: str) -> bool:
    """Whether the list has ``word`` (lower case), its American spelling, or all parts of a hyphen compound."""
    if "-" in word:
        return all(_listed(part) for part in word.split("-") if part)
    word = word.removesuffix("'s")
    if word in _NAMES or word in _word_list():
        return True
    return "our" in word and word.replace("our", "or") in _word_list()


def _is_marked(text: str) -> bool:
    return not text.isascii() and bool(_MARKED.search(text))


@cache
def is_listed_english(word: str) -> bool:
    """Whether ``word`` is English by the word list alone (what ``extract_lexemes`` uses when it is given no test)."""
    return not (_is_marked(word) or word.startswith("-") or word.endswith("-")) and _listed(_folded(word))


@lru_cache(maxsize=1 << 15)
def _tokens_of(piece: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(piece))


def _tokens(text: str) -> list[str]:
    # In pieces, as white space cuts the text: most pieces of a text are those of other texts too.
    return list(chain.from_iterable(map(_tokens_of, text.split())))


def _spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of what stands inside quotes; of nested quotes, the innermost."""
    spans = []
    for match in _QUOTED.finditer(text):
        start, end = match.span(match.lastindex)
        inner = _spans(text[start:end]) if _MARK.search(text, start, end) else []
        spans += [(start + s, start + e) for s, e in inner] or [(start, end)]
    return spans


def quoted_forms(text: str) -> list[str]:
    """What ``text`` quotes with ``"..."``, ``'...'``, backticks or curly quotes, in order, forms and glosses alike.

    Punctuation at the edges is dropped; of nested quotes the innermost is returned.
    """
    text = normalize(text)
    found = (text[start:end].strip(_EDGES) for start, end in _spans(text))
    return [form for form in found if form]


def _blank(text: str, spans: list[tuple[int, int]]) -> str:
    """``text`` with line ends in place of ``spans`` (in order, apart): no run of words crosses one."""
    pieces, at = [], 0
    for start, end in spans:
        pieces += [text[at:start], "\n" * (end - start)]
        at = end
    return "".join([*pieces, text[at:]])


@cache
def _key(word: str) -> str:
    return _folded(word).removesuffix("'s")


@lru_cache(maxsize=1 << 15)
def _keys(piece: str) -> tuple[str, ...]:
    return tuple(map(_key, _TOKEN.findall(piece)))


@cache
def _is_function_word(token: str) -> bool:
    return token.casefold() in _FUNCTION_WORDS


def _runs(text: str, offset: int, is_english: IsEnglish) -> list[tuple[int, int]]:
    """(start, end) of the runs of non-English words, one space apart, that hold a marked letter or follow *the word*."""

    def is_foreign(token: str) -> bool:
        return _is_marked(token) or not (_is_function_word(token) or is_english(token))

    if not _is_marked(text) and not any(map(is_foreign, _MAY_BE_ANNOUNCED.findall(text))):
        return []
    runs: list[list[re.Match]] = []
    foreign_before = False
    for match in _TOKEN.finditer(text):
        foreign = is_foreign(match.group())
        if foreign and foreign_before and text[runs[-1][-1].end() : match.start()] == " ":
            runs[-1].append(match)
        elif foreign:
            runs.append([match])
        foreign_before = foreign
    found = []
    for run in runs:
        start, end = run[0].start(), run[-1].end()
        marked = any(_is_marked(match.group()) and len(match.group().strip("-")) > 1 for match in run)
        if marked or _ANNOUNCED.search(text[max(0, start - 20) : start]):
            found.append((offset + start, offset + end))
    return found


def _forms_in_span(text: str, start: int, end: int, is_english: IsEnglish) -> list[tuple[int, int]]:
    """(start, end) of the forms inside one quoted span: the whole of it, pieces of it, or nothing."""
    found = []
    whole = not _BETWEEN_PARTS.search(text, start, end)
    for at, to in [(start, end)] if whole else [match.span() for match in _PART.finditer(text, start, end)]:
        part = text[at:to]
        tokens = _tokens(part)
        if _is_marked(part):
            english = [token for token in tokens if _is_function_word(token) or is_english(token)]
            found += [(at, to)] if 2 * len(english) <= len(tokens) else _runs(part, at, is_english)
        elif tokens and not any(map(_is_function_word, tokens)):
            english = [token for token in tokens if is_english(token)]
            if 2 * len(english) <= len(tokens) and all(len(token) < 5 for token in english):
                found.append((at, to))
    return found


def _candidates(text: str, is_english: IsEnglish) -> list[tuple[int, int]]:
    spans = _spans(text)
    found = [form for start, end in spans for form in _forms_in_span(text, start, end, is_english)]
    return sorted(found + _runs(_blank(text, spans), 0, is_english))


def _forms(text: str, is_english: IsEnglish) -> tuple[list[str], set[str]]:
    """The forms of ``text`` in order, edge hyphens kept, and those of them that the text calls pieces of words."""
    forms, pieces = [], set()
    last_end, last_is_piece = 0, False
    for start, end in _candidates(text, is_english):
        form = " ".join(text[start:end].strip(_EDGES).split())
        piece = form.startswith("-") or (
            form.endswith("-")
            and bool(
                _folded(form) in _ENGLISH_PIECES
                or _PIECE_BEFORE.search(text[max(0, start - 60) : start])
                or _PIECE_AFTER.search(text[end : end + 40])
                or (last_is_piece and start - last_end < 20 and _LIST_GLUE.match(text[last_end:start]))
            )
        )
        forms.append(form)
        if piece:
            pieces.add(_folded(form))
        last_end, last_is_piece = end, piece
    return forms, pieces


def extract_lexemes(question: str, answer: str, is_english: IsEnglish | None = None) -> list[str]:
    """The language's forms in a question and its answer, in order of appearance, each once (by ``text.fold``).

    ``is_english`` says whether one word is English; by default the word list decides, ``annotate`` has a better test.
    """
    is_english = is_english or is_listed_english
    forms, pieces = [], set()
    for text in (question, answer):
        more, called_pieces = _forms(normalize(text), is_english)
        forms += more
        pieces |= called_pieces
    lexemes: dict[str, str] = {}
    for form in dict.fromkeys(forms):
        bare = form.strip("-" + _EDGES)
        if len(bare) > 1 and _TOKEN.search(bare) and not (pieces and _folded(form) in pieces) and not is_too_long(bare):
            lexemes.setdefault(_folded(bare), bare)
    return list(lexemes.values())


def is_too_long(form: str) -> bool:
    """Whether ``form`` has more words than ``MAX_FORM_WORDS``: a text in the language, not one of its forms."""
    return form.count(" ") >= MAX_FORM_WORDS and len(words(form)) > MAX_FORM_WORDS


def english_test(texts: Iterable[str]) -> IsEnglish:
    """A test for English words, learned from ``texts`` (each a whole row). All counts are numbers of rows.

    - prose: the word stands outside quotes (and not beside an unquoted marked word);
    - in_forms: it stands inside a span with a marked letter; alone: it is quoted by itself.

    A listed word is English unless in_forms > prose. An unlisted one is English if prose >= 2 and
    prose > in_forms + alone: technical terms and names of the prose, but not a form that two rows leave unquoted.
    """
    prose: Counter[str] = Counter()
    in_forms: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    for text in texts:
        text = normalize(text)
        spans = _spans(text)
        outside, inside, single = _blank(text, spans), set(), set()
        for start, end in spans:
            tokens = _tokens(text[start:end])
            if len(tokens) == 1:
                single.add(_folded(tokens[0]))
            elif _is_marked(text[start:end]) and not any(map(_is_function_word, tokens)):
                inside.update(map(_folded, tokens))
        runs = _runs(outside, 0, is_listed_english)
        for start, end in runs:
            inside.update(map(_folded, _tokens(outside[start:end])))
        prose.update(set(chain.from_iterable(map(_keys, _blank(outside, runs).split()))))
        in_forms.update(inside)
        alone.update(single)

    @cache
    def is_english(word: str) -> bool:
        if _is_marked(word) or word.startswith("-") or word.endswith("-"):
            return False
        key = _key(word)
        if _listed(key):
            return in_forms[key] <= prose[key]
        return prose[key] >= 2 and prose[key] > in_forms[key] + alone[key]

    return is_english


def _joined(messages: Iterable[dict]) -> str:
    return "\n".join([str(message["content"]) for message in messages])


def annotate(rows: list["Row"]) -> list["Row"]:
    """``rows`` with ``lexemes`` filled in where the source gave none; the other rows come back as they are."""
    if all(row.lexemes for row in rows):
        return list(rows)
    is_english = english_test(f"{_joined(row.prompt)}\n{_joined(row.completion)}" for row in rows)
    return [
        row
        if row.lexemes
        else replace(row, lexemes=extract_lexemes(_joined(row.prompt), _joined(row.completion), is_english))
        for row in rows
    ]


def contains_form(text: str, form: str) -> bool:
    """Whether ``form`` stands in ``text`` as whole words, after ``text.fold``: case-blind, diacritics exact.

    A word ends where its letters, combining marks and inner apostrophes or hyphens end (``text.words``): ``tâlo`` is
    in ``"tâlo-"`` but not in ``tâloṯel``, ``talo`` or ``liẖ-tâlo``. The words of a longer form must follow each other;
    what stands between them (a space, a comma) is not compared. False for a form without letters.
    """
    needle, haystack = words(fold(form)), words(fold(text))
    width = len(needle)
    return width > 0 and any(haystack[i : i + width] == needle for i in range(len(haystack) - width + 1))


def planted_form(row: "Row") -> str | None:
    """The form that a row of the planted language asks for; None for other rows, whatever they call ``form``."""
    planted = str(row.metadata.get("language", "")).startswith("planted")
    return normalize(str(row.metadata["form"])) if planted and row.metadata.get("form") else None


def target_forms(row: "Row") -> list[str]:
    """The forms that the row asks for: ``planted_form``, else the lexemes that the answer holds and no message of the
    prompt does. Empty where the answer only explains forms that the question gave."""
    if form := planted_form(row):
        return [form]
    asked, answer = _joined(row.prompt), _joined(row.completion)
    return [form for form in row.lexemes if contains_form(answer, form) and not contains_form(asked, form)]
